"""A process that has imported everything, and from which the processes of a run are forked: a start costs no imports.

It is told of each process in one message over a socket, the pipe for its output beside it, and answers with its id and,
when it ends, with its status. Nothing of JAX's that has threads is started in it, it has none of its own,
and what stops a run passes it by.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# What a run imports sooner or later; a module that is missing is told of by the run itself.
_TRAINING = (
    "adaptive.training.loop",
    "adaptive.training.fitting",
    "adaptive.training.plan",
    "orbax.checkpoint",
    "optax",
)
_POLL_S = 0.02


class Forked:
    """One process of a `Forks`."""

    def __init__(self, forks: "Forks", pid: int):
        self._forks, self.pid = forks, pid

    @property
    def returncode(self) -> int | None:
        """As of subprocess: minus the number for a signal, None while it runs."""
        return self._forks.returncode(self.pid)

    def poll(self) -> int | None:
        self._forks.hear()
        return self.returncode


class Forks:
    """Starts processes that are `python -m module`, each with its own arguments and environment.

    module  of the processes; what it needs is imported once, before the first
    env     of that import: the variables that JAX reads then are the same for all
    """

    def __init__(self, module: str, env: Mapping[str, str]):
        ours, theirs = socket.socketpair()
        program = f"from {__name__} import serve; serve({theirs.fileno()}, {module!r})"
        with theirs:
            # A session of its own: a Ctrl-C at the terminal reaches the launcher alone.
            self._server = subprocess.Popen(
                [sys.executable, "-c", program], env=dict(env), pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._socket, self._rest = ours, b""
        self._ended: dict[int, int] = {}

    def start(self, arguments: Sequence[str], env: Mapping[str, str], output: int) -> Forked:
        """A process whose standard output and error go to the file descriptor. Raises OSError if it cannot be."""
        request = json.dumps({"arguments": list(arguments), "env": dict(env)}).encode()
        socket.send_fds(self._socket, [len(request).to_bytes(4, "big")], [output])
        self._socket.sendall(request)
        while True:
            pid = self._heard(block=True)
            if pid:
                return Forked(self, pid)

    def returncode(self, pid: int) -> int | None:
        return self._ended.get(pid)

    def hear(self) -> None:
        """Takes note of all processes that have ended."""
        while self._heard(block=False) is not None:
            pass

    def close(self) -> None:
        """Ends the server; processes that run go on."""
        self._socket.close()
        self._server.wait()

    def _heard(self, *, block: bool) -> int | None:
        """Takes one answer: the id of a process that was started, 0 for one that ended, None if there is none yet."""
        while b"\n" not in self._rest:
            if not block and not select.select([self._socket], [], [], 0)[0]:
                return None
            if not (more := self._socket.recv(4096)):
                raise OSError("the process from which those of the run are forked has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        pid, status = json.loads(line)
        if status is None:
            return int(pid)
        self._ended[pid] = status
        return 0


def serve(number: int, module: str) -> None:
    """What the server does, with the file descriptor of its socket."""
    channel = socket.socket(fileno=number)
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for name in ("jax", "numpy", "adaptive.parallel.cluster", *(_TRAINING if module == "adaptive.train" else ())):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the objects of the imports stay where they are: pages that no process changes are shared
    running: set[int] = set()
    while True:
        if select.select([channel], [], [], _POLL_S if running else None)[0]:
            size, files, _, _ = socket.recv_fds(channel, 4, 1)
            if not size:  # the launcher has gone
                for pid in running:
                    os.killpg(pid, signal.SIGTERM)
                return
            request = json.loads(_exactly(channel, int.from_bytes(size, "big")))
            pid = os.fork()
            if not pid:
                channel.close()
                for each, handler in before.items():
                    signal.signal(each, handler)
                _become(module, request, files[0])
            os.close(files[0])
            running.add(pid)
            channel.sendall(json.dumps([pid, None]).encode() + b"\n")
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                channel.sendall(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        parts += channel.recv(size - len(parts))
    return parts


def _become(module: str, request: dict[str, Any], output: int) -> None:
    """Runs the module as `python -m` does, in a forked process, which ends with what it raises."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # The streams of the server know the place of a file; these lead to a pipe.
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [module, *request["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)
