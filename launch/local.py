"""Several processes of one run on this machine, over loopback.

    adaptive launch --processes 2 --devices_per_process 4 -- --recipe mor_tiny mesh.fsdp=8

Each process is `python -m adaptive.train` with the arguments after `--`, and sees its own emulated CPU devices: a way
to try a multi-process run, its data, its checkpoints and its mesh before a cluster does. (Several GPUs of one machine
need no launcher: one process uses them all.)

Every line of output carries the number of its process. When a process fails, the others are ended, the last traceback
of the one that failed first is shown last, and its exit code is the launcher's. Ctrl-C and SIGTERM are passed on, so
that the run can save; a second one ends everything at once.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.launch.local"))

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from adaptive import command
from adaptive.command import number

PREEMPTED = 75  # adaptive.train was asked to stop, and saved
LOST = 76  # another process of the job was lost
GRACE_S = 5.0  # for the others, after one process failed
SAVING_GRACE_S = 300.0  # for the others, when they are saving


class Process:
    """One process of the run, its output shown line by line and its last lines kept."""

    def __init__(self, index: int, command: Sequence[str], env: dict[str, str]):
        self.index = index
        self.tail: collections.deque[str] = collections.deque(maxlen=200)
        self.popen = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C at the terminal reaches the launcher alone, which passes it on
        )
        self._reader = threading.Thread(target=self._show, daemon=True)
        self._reader.start()

    def _show(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.tail.append(line)
            # One write for the whole line: `print` writes its end apart, and another process's line could come between.
            sys.stdout.write(f"[{self.index}] {line.rstrip()}\n")
            sys.stdout.flush()

    def send(self, number: int) -> None:
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, number)

    def last_traceback(self) -> str:
        self._reader.join(timeout=5)
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
        time.sleep(0.05)
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


def options(about: str) -> command.Options:
    made = command.Options("launch", about)
    made.add_argument("--processes", type=number(int, least=1, most=1000), default=2, help="how many (default 2)")
    emulated = "emulated CPU devices of each (default 1)"
    made.add_argument("--devices_per_process", type=number(int, least=1, most=1000), default=1, help=emulated)
    made.add_argument("--module", default="adaptive.train", help="what each runs, as in python -m MODULE")
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


def launch(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs the processes, each with the arguments; the exit code."""
    port = free_port()
    each = [sys.executable, "-m", given.module, *arguments]
    processes: list[Process] = []
    stop = threading.Event()

    def pass_on(number: int, _frame: object) -> None:
        again = stop.is_set()
        stop.set()
        for process in processes:
            process.send(signal.SIGKILL if again else number)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGHUP, pass_on)
    for index in range(given.processes):
        env = environment(index, given.processes, given.devices_per_process, port)
        processes.append(Process(index, each, env))
    first = wait(processes, stop)
    if first is None:
        return 0
    code = exit_code(first.popen.returncode)
    print(f"\nprocess {first.index} ended first, with exit code {code}; the end of its output:", flush=True)
    print(first.last_traceback(), end="", flush=True)
    return code
