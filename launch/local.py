"""Several processes of one run on this machine, over loopback.

    adaptive launch --processes 2 --devices_per_process 4 -- --recipe mor_tiny mesh.fsdp=8
    adaptive launch --restarts 20 -- --recipe mor_tiny --workdir runs/one

Each process is `python -m adaptive.train` with the arguments after `--`, and sees its own emulated CPU devices: a way
to try a multi-process run, its data, its checkpoints and its mesh before a cluster does. (Several GPUs of one machine
need no launcher: one process uses them all.)

Every line of output carries the number of its process. When a process fails, the others are ended, the last traceback
of the one that failed first is shown last, and its exit code is the launcher's. With --restarts, all are started again
instead, so many times at most, and go on from the newest checkpoint of their --workdir; not where the same would happen
again (exit codes 2, 3 and 4, and 1 three times in a row). Ctrl-C and SIGTERM are passed on, so that the run can save; a
second one ends everything at once.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.launch.local"))

import argparse
import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from adaptive import command
from adaptive.command import number
from adaptive.launch.forks import Forks
from adaptive.launch.job import FINAL
from adaptive.parallel.cluster import LOST, PREEMPTED

HOPELESS = (*FINAL, command.INTERRUPTED)  # what would happen again, or was wanted
MOST_ERRORS = 3  # of code 1 in a row, after which another start will not help
GRACE_S = 5.0  # for the others, after one process failed
SAVING_GRACE_S = 300.0  # for the others, when they are saving
_POLL_S = 0.02


class Running(Protocol):
    """A process that was started, as subprocess and `Forks` make them."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...


class Starter:
    """Starts processes that run `python -m module`: forked where that is safe, which costs no imports."""

    def __init__(self, module: str):
        self._module = module
        self._forks: Forks | None = None

    def start(self, arguments: Sequence[str], env: dict[str, str], output: int) -> Running:
        if not sys.platform.startswith("linux"):  # libraries of macOS do not outlive a fork
            each = [sys.executable, "-m", self._module, *arguments]
            return subprocess.Popen(
                each, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._forks = self._forks or Forks(self._module, env)
        return self._forks.start(arguments, env, output)

    def close(self) -> None:
        if self._forks is not None:
            self._forks.close()


class Process:
    """One process of the run, its output shown line by line and its last lines kept."""

    def __init__(self, index: int, starter: Starter, arguments: Sequence[str], env: dict[str, str]):
        self.index = index
        self.tail: collections.deque[str] = collections.deque(maxlen=200)
        read, write = os.pipe()
        try:
            self.popen = starter.start(arguments, env, write)
        finally:
            os.close(write)
        self._reader = threading.Thread(target=self._show, args=(read,), daemon=True)
        self._reader.start()

    def _show(self, read: int) -> None:
        with open(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self.tail.append(line)
                # One write for the whole line: `print` writes its end apart, and another's line could come between.
                sys.stdout.write(f"[{self.index}] {line.rstrip()}\n")
                sys.stdout.flush()

    def send(self, number: int) -> None:
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)

    def finish(self) -> None:
        """Waits for the rest of the output."""
        self._reader.join(timeout=5)

    def last_traceback(self) -> str:
        self.finish()
        lines = list(self.tail)
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        return "".join(lines[starts[-1] :] if starts else lines[-20:])


def exit_code(status: int) -> int:
    """A shell's exit code for a status of subprocess: 128 plus the number for a signal."""
    return status if status >= 0 else 128 - status


def wait(processes: Sequence[Process], stop: threading.Event) -> Process | None:
    """Waits until all have ended; returns the process that failed first, if one did."""
    first: Process | None = None
    running = list(processes)
    give_up = None
    while running:
        ended = [p for p in running if p.popen.poll() is not None]
        for process in sorted(ended, key=lambda p: p.popen.returncode == LOST):  # after the one that they lost
            running.remove(process)
            if process.popen.returncode and first is None:
                first = process
                saving = stop.is_set() or process.popen.returncode == PREEMPTED
                give_up = time.monotonic() + (SAVING_GRACE_S if saving else GRACE_S)
                if not saving:
                    for other in running:
                        other.send(signal.SIGTERM)
        if give_up is not None and time.monotonic() > give_up:
            for other in running:
                other.send(signal.SIGKILL)
        time.sleep(_POLL_S)
    for process in processes:
        process.finish()
    return first


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    env["ADAPTIVE_COORDINATOR"] = f"127.0.0.1:{port}"
    env["ADAPTIVE_PROCESSES"] = str(processes)
    env["ADAPTIVE_PROCESS"] = str(index)
    env["ADAPTIVE_HOSTS"] = "1"
    env["JAX_PLATFORMS"] = "cpu"
    env["PYTHONUNBUFFERED"] = "1"
    flags = [f for f in env.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    env["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    return env


def options(about: str, name: str = "launch") -> command.Options:
    made = command.Options(name, about)
    made.add_argument("--processes", type=number(int, least=1, most=1000), default=2, help="how many (default 2)")
    emulated = "emulated CPU devices of each (default 1)"
    made.add_argument("--devices_per_process", type=number(int, least=1, most=1000), default=1, help=emulated)
    made.add_argument("--module", default="adaptive.train", help="what each runs, as in python -m MODULE")
    again = "how often all are started again after a failure that this may mend (default 0)"
    made.add_argument("--restarts", type=number(int, least=0, most=1_000_000), default=0, help=again)
    return made


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and those of every process, which stand after --."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:at]], [*arguments[at + 1 :]]


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    own, rest = split(arguments)
    return launch(options(__doc__ or "").read(own), rest)


def launch(given: argparse.Namespace, arguments: Sequence[str], running: list[Process] | None = None) -> int:
    """Runs the processes, each with the arguments, again after failures where that is asked for; the exit code.

    running  is made to hold the processes of the newest start, for who watches them from another thread
    """
    running = [] if running is None else running
    with passing_on(running) as stop, contextlib.closing(Starter(given.module)) as starter:
        errors = 0
        for restart in range(1, given.restarts + 2):
            running[:] = started(given, arguments, starter)
            first = wait(running, stop)
            if first is None:
                return 0
            code = exit_code(first.popen.returncode or 0)
            errors = errors + 1 if code == 1 else 0
            who = f"process {first.index} ended first, with exit code {code}"
            if stop.is_set() or code in HOPELESS or errors == MOST_ERRORS or restart > given.restarts:
                print(f"\n{who}; the end of its output:", flush=True)
                print(first.last_traceback(), end="", flush=True)
                return code
            print(f"job: {who}; restart {restart} of {given.restarts}, from the newest checkpoint", flush=True)
    raise AssertionError


def started(given: argparse.Namespace, arguments: Sequence[str], starter: Starter) -> list[Process]:
    port = free_port()
    envs = [environment(i, given.processes, given.devices_per_process, port) for i in range(given.processes)]
    return [Process(index, starter, arguments, env) for index, env in enumerate(envs)]


@contextlib.contextmanager
def passing_on(running: list[Process]) -> Iterator[threading.Event]:
    """While the block runs, signals are passed on to the processes, and the event tells that one came."""
    stop = threading.Event()

    def pass_on(number: int, _frame: object) -> None:
        again = stop.is_set()
        stop.set()
        for process in running:
            process.send(signal.SIGKILL if again else number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
