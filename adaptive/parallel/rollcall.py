"""A roll call before the processes of a job hand over to JAX, which aborts without naming who is missing.

Process 0 listens at the coordinator's address; each of the others connects and says its index. When all are there, or
the time is up, every process that came is told who is absent; then the port is free again for JAX.
"""

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from adaptive.errors import AbsentError, ClusterError

LIMIT = "ADAPTIVE_START_LIMIT"  # the environment variable with the seconds for all processes to be there
_REMIND_S = 15.0
_MISSING = "missing: "  # a last word that begins so is about processes that did not come


def resolve(coordinator: str, hosts: int, deadline: float) -> str:
    """`host:port` with the host's address in place of its name; tries until `deadline` (of time.monotonic).

    Raises AbsentError if the name does not resolve, ClusterError if it leads to this machine alone while the job has
    several.
    """
    host, port = coordinator.rsplit(":", 1)
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            break
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise AbsentError(f"the coordinator's name {host} does not resolve here: {error}") from None
            time.sleep(1)
    address = found[0][4][0]
    if hosts > 1 and ipaddress.ip_address(address).is_loopback:
        raise ClusterError(
            f"the coordinator {coordinator} is {address} here, which other machines cannot reach, and the job has "
            f"{hosts} hosts: set ADAPTIVE_COORDINATOR=ADDRESS:PORT with an address of process 0's network "
            "(if all processes are on this machine: ADAPTIVE_HOSTS=1)"
        )
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


class Present(NamedTuple):
    """hosts: of every process, by its index; port: what process 0 gave for its own use."""

    hosts: list[str]
    port: int


def gather(
    address: str, processes: int, index: int, deadline: float, say: Callable[[str], None], port: int = 0
) -> Present:
    """Returns in every process once all are there; `port` is that of process 0.

    Raises in every process that came AbsentError if one is missing at `deadline`, ClusterError if two have the same
    index or believe in another number of processes.
    """
    host, own = address.rsplit(":", 1)
    if index == 0:
        return _call(int(own), processes, deadline, say, port)
    return _answer(host.strip("[]"), int(own), processes, index, deadline, say)


def _call(port: int, processes: int, deadline: float, say: Callable[[str], None], given: int) -> Present:
    try:
        server = socket.create_server(("", port), backlog=processes)
    except OSError as error:
        raise ClusterError(f"process 0 cannot listen on port {port}: {error.strerror}; choose another one") from None
    present: dict[int, tuple[socket.socket, str]] = {}
    problem = ""
    begin, remind = time.monotonic(), time.monotonic() + _REMIND_S
    with server:
        server.settimeout(0.5)
        while len(present) < processes - 1 and not problem:
            absent = sorted(set(range(1, processes)) - set(present))
            now = time.monotonic()
            if now > deadline:
                problem = _MISSING + (
                    f"process {_names(absent)} of {processes} did not connect to port {port} within "
                    f"{deadline - begin:.0f} s ({LIMIT} sets how many)"
                )
                break
            if now > remind:
                text = f"waiting for process {_names(absent)}, {deadline - now:.0f} s left"
                say(f"job: {text}")
                for peer, _ in present.values():
                    _tell(peer, text)
                remind = now + _REMIND_S
            try:
                peer, _ = server.accept()
                problem = _greet(peer, present, processes)
            except OSError:  # nobody yet, or somebody else's connection
                continue
    hosts = [socket.gethostname(), *(present[i][1] for i in sorted(present))]
    for peer, _ in present.values():
        _dismiss(peer, problem or f"ready {json.dumps([hosts, given])}")
    if problem:
        raise _error(problem)
    return Present(hosts, given)


def _greet(peer: socket.socket, present: dict[int, tuple[socket.socket, str]], processes: int) -> str:
    """Notes who `peer` is. Returns what is wrong with the job, if anything; a stranger is sent away."""
    peer.settimeout(5)
    words = peer.recv(400).decode("ascii", "replace").split()
    if len(words) != 4 or words[0] != "adaptive" or not (words[1] + words[2]).isdigit():
        peer.close()
        return ""
    index, believes = int(words[1]), int(words[2])
    problem = ""
    if believes != processes:
        problem = f"process {index} was started for {believes} processes, process 0 for {processes}"
    elif index in present or not 0 < index < processes:
        problem = f"two processes have index {index}; each needs its own, 0 to {processes - 1}"
    if problem:
        _dismiss(peer, problem)
    else:
        present[index] = peer, words[3]
    return problem


def _tell(peer: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # it has gone: it is missed, or comes again
        peer.sendall(f"{line}\n".encode())


def _dismiss(peer: socket.socket, word: str) -> None:
    """Sends the last word and lets the other side close first, so that no port stays reserved on this one."""
    with peer:
        try:
            peer.settimeout(5)
            peer.sendall(word.encode())
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
        except OSError:
            pass


def _answer(host: str, port: int, processes: int, index: int, deadline: float, say: Callable[[str], None]) -> Present:
    remind = time.monotonic() + _REMIND_S
    while True:
        now = time.monotonic()
        if now > deadline:
            raise AbsentError(
                f"process 0 does not answer at {host}:{port}: it did not start there, ended, or a firewall is between "
                f"({LIMIT} sets how many seconds to wait)"
            )
        if now > remind:
            say(f"job: waiting for process 0 at {host}:{port}, {deadline - now:.0f} s left")
            remind = now + _REMIND_S
        try:
            with socket.create_connection((host, port), timeout=2) as caller:
                name = socket.gethostname().encode("ascii", "replace").decode() or "?"
                caller.sendall(f"adaptive {index} {processes} {name[:255]}".encode())
                caller.settimeout(max(1.0, deadline - time.monotonic() + 5))
                word = _last_word(caller, say)
        except OSError:
            time.sleep(0.3)
            continue
        if word.startswith("ready "):
            return Present(*json.loads(word.removeprefix("ready ")))
        if word:
            raise _error(word)
        time.sleep(0.3)  # the caller went away: it may be starting again


def _last_word(caller: socket.socket, say: Callable[[str], None]) -> str:
    """What process 0 says last; what it says before is who is missing."""
    with caller.makefile("r", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith("waiting "):
                return line.rstrip("\n")
            say(f"job: {line.rstrip()}")
    return ""


def _error(word: str) -> ClusterError:
    return AbsentError(word.removeprefix(_MISSING)) if word.startswith(_MISSING) else ClusterError(word)


def _names(indices: list[int]) -> str:
    listed = ", ".join(map(str, indices[:8]))
    return f"{listed} and {len(indices) - 8} more" if len(indices) > 8 else listed
