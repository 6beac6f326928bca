"""A run whose processes are killed again and again, and what that costs.

    ./scripts/chaos --mtbf 60 --workdir runs/chaos
    ./scripts/chaos --processes 2 --mtbf 30 --seed 7 --workdir runs/chaos -- --recipe mor_tiny train.steps=400

The run is trained twice by `adaptive launch`: left alone, and with processes chosen at random that get SIGKILL, or one
time in five SIGTERM, after random times whose mean is --mtbf seconds (--even: each time after exactly so many); the
launcher starts it again each time. Then

- both runs must have ended with the same parameters, optimizer's state and position in the data, bit for bit, and
- goodput is told: (steps of the run x the undisturbed run's median step) / (wall time of the disturbed run, from the
  launcher's start to its end), and beside it the run's own account (docs/faults.md).

Writes WORKDIR/chaos.json. Exit codes: 0 the same bits, 1 not, or a run failed.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.launch.chaos"))

import argparse
import dataclasses
import itertools
import json
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adaptive import command
from adaptive.command import number
from adaptive.launch import local
from adaptive.launch.local import Process

# A small dense model, and nothing but training; what stands after -- comes in place of its settings.
RUN = (
    "--recipe=vanilla_tiny", "train.steps=900", "checkpoint.every=0", "checkpoint.every_s=4",
    "checkpoint.keep_last=2", "eval.every=0", "eval.rows=32", "log.every=20", "log.wandb=disabled",
    "log.sample_tokens=0",
)  # fmt: skip
TERM_SHARE = 0.2  # of the failures; the others are SIGKILL


@dataclasses.dataclass(frozen=True)
class Failure:
    """at: seconds after the launcher's start; process: its index."""

    at: float
    process: int
    signal: str


class Killer:
    """Ends random processes of `running` from a thread, while the block runs.

    mtbf    mean seconds between failures, which are exponentially distributed
    even    whether they are evenly spaced instead
    most    failures in all; None: no limit
    """

    def __init__(self, running: list[Process], mtbf: float, seed: int, *, even: bool = False, most: int | None = None):
        self.failures: list[Failure] = []
        self._running, self._mtbf, self._even, self._most = running, mtbf, even, most
        self._random = random.Random(seed)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._kill, name="chaos", daemon=True)

    def __enter__(self) -> "Killer":
        self._begin = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def pause(self) -> bool:
        """Waits for the next failure; whether the run has ended meanwhile."""
        return self._done.wait(self._mtbf if self._even else self._random.expovariate(1 / self._mtbf))

    def _kill(self) -> None:
        while self._most is None or len(self.failures) < self._most:
            if self.pause():
                return
            alive = [process for process in list(self._running) if process.popen.poll() is None]
            if not alive:
                continue
            victim = self._random.choice(alive)
            kind = signal.SIGTERM if self._random.random() < TERM_SHARE else signal.SIGKILL
            victim.send(kind)
            self.failures.append(Failure(round(time.monotonic() - self._begin, 2), victim.index, kind.name))
            print(f"chaos: {kind.name} to process {victim.index}", flush=True)


def options() -> command.Options:
    made = local.options(__doc__ or "", "chaos")
    made.set_defaults(restarts=10**6)
    made.add_argument("--workdir", required=True, help="folder for both runs and chaos.json; must be new or empty")
    made.add_argument("--mtbf", type=number(float, above=0), default=60.0, help="mean seconds between failures (60)")
    made.add_argument("--seed", type=number(int, least=0), default=0, help="of the failures (0)")
    made.add_argument("--even", action="store_true", help="exactly so many seconds between failures, not on average")
    made.add_argument("--failures", type=number(int, least=0), help="at most so many (default: no limit)")
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    own, rest = local.split(arguments)
    given = options().read(own)
    folder = Path(given.workdir)
    code, _ = timed(lambda: trained(given, rest, folder / "undisturbed", []))
    if code:
        return code
    running: list[Process] = []
    with Killer(running, given.mtbf, given.seed, even=given.even, most=given.failures) as killer:
        code, wall = timed(lambda: trained(given, rest, folder / "disturbed", running))
    if code:
        return code
    found = measured(folder, wall, killer.failures)
    (folder / "chaos.json").write_text(
        json.dumps({"mtbf": given.mtbf, "even": given.even, "seed": given.seed, **found}, indent=2) + "\n",
        encoding="utf-8",
    )
    print("\n" + "\n".join(told(found)), flush=True)
    return 0 if found["same"] else 1


def timed(call: Callable[[], int]) -> tuple[int, float]:
    begin = time.monotonic()
    return call(), time.monotonic() - begin


def trained(given: argparse.Namespace, rest: Sequence[str], workdir: Path, running: list[Process]) -> int:
    named = {word.partition("=")[0] for word in rest}
    own = [word for word in RUN if word.partition("=")[0] not in named]
    return local.launch(given, [*own, *rest, f"--workdir={workdir}"], running)


def measured(folder: Path, wall: float, failures: Sequence[Failure]) -> dict[str, Any]:
    """What both runs left, compared."""
    from adaptive.training.goodput import read_attempts, spent

    before, after = (ended(folder / name) for name in ("undisturbed", "disturbed"))
    step_s = statistics.median(step_times(folder / "undisturbed"))
    attempts = read_attempts(folder / "disturbed")
    own = spent(attempts)
    return {
        "same": before == after,
        "step": after["step"],
        "digest": after["digest"],
        "failures": [dataclasses.asdict(failure) for failure in failures],
        "wall_s": round(wall, 2),
        "step_s": round(step_s, 5),
        "goodput": round(after["step"] * step_s / wall, 4),
        "step_s_disturbed": round(statistics.median(step_times(folder / "disturbed")), 5),
        "recovery_s": [round(seconds, 2) for seconds in recoveries(attempts)],
        "own_account": {"goodput": own.goodput, "attempts": own.attempts, "seconds": own.seconds},
    }


def recoveries(attempts: Sequence[Any]) -> list[float]:
    """Seconds of each start but the first, from the last sign of the one before to its own first step."""
    kinds = ("start", "compile", "restore")
    return [
        after.begin - before.end + sum(after.seconds.get(kind, 0.0) for kind in kinds)
        for before, after in itertools.pairwise(attempts)
    ]


def ended(workdir: Path) -> dict[str, Any]:
    """What the newest checkpoint is: its step, the digest of its arrays, the position in the data."""
    newest = max(
        (path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    about = json.loads((newest / "about" / "metadata").read_text(encoding="utf-8"))
    return {name: about[name] for name in ("step", "digest", "data_state")}


def step_times(workdir: Path) -> list[float]:
    """Seconds of a step in each row of metrics."""
    rows = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["step_ms"] / 1e3 for row in rows if row.get("step_ms")]


def told(found: dict[str, Any]) -> list[str]:
    own = found["own_account"]
    wall, step_ms = f"{found['wall_s']:.0f} s", 1e3 * found["step_s"]
    kinds = ", ".join(f"{kind} {value:.1f}" for kind, value in own["seconds"].items() if value >= 0.05)
    signals = [failure["signal"] for failure in found["failures"]]
    return [
        f"failures     {signals.count('SIGKILL')} SIGKILL and {signals.count('SIGTERM')} SIGTERM in {wall}",
        f"same bits    {found['same']} after step {found['step']}, state digest {found['digest']}",
        f"goodput      {found['goodput']:.1%}: {found['step']} steps of {step_ms:.1f} ms, as undisturbed, in {wall}",
        f"recovery     {', '.join(f'{seconds:.1f}' for seconds in found['recovery_s'])} s until the next step",
        f"own account  {own['goodput']:.1%} over {own['attempts']} starts; seconds: {kinds}",
    ]
