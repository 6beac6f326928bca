"""Where the wall time of a run went, over all its attempts: what of it were steps that count, and what was not.

WORKDIR/goodput.json has one object per attempt, the newest one rewritten while it goes on:

    {"begin": 1796.1, "end": 1850.4, "first": 40, "last": 75, "stopped": false, "seconds": {"step": 31.0, ...}}

begin, end   Unix time: when the process began, and when the account was last written
first, last  steps taken before and after it
stopped      whether it ended in order: done, or asked to stop
seconds      of the main thread of process 0, by kind:

    start       until the first step: imports, joining the others, opening data; what of it is none of the below
    compile     compiling programs, or reading them from a cache
    restore     reading a checkpoint, or drawing the parameters
    data        waiting for rows while the devices had nothing to do
    step        training steps
    evaluation  held-out text, sets and tasks
    save        what steps wait for while a checkpoint is begun, and the last one written
    end         report, sample, dashboards
"""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adaptive.data.files import write_text_atomically

GOODPUT_FILE = "goodput.json"
KINDS = ("start", "compile", "restore", "data", "step", "evaluation", "save", "end")
_REWRITE_S = 1.0  # at most so often


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of a run; see above."""

    begin: float
    end: float
    first: int = 0
    last: int = 0
    stopped: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spent:
    """Wall seconds of a run: by kind, with what its failures cost.

    seconds  as of an attempt; "step" has the steps that count alone; "lost": steps that were taken again; "down": from
             the last that is known of an attempt that failed to the next
    total    of all kinds
    goodput  share of the steps that count; None before the first
    """

    seconds: dict[str, float]
    attempts: int
    failures: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        return self.seconds["step"] / self.total if self.seconds.get("step") else None


def spent(attempts: Sequence[Attempt]) -> Spent:
    """What attempts, oldest first, make together. Time after an attempt that ended in order is nobody's."""
    seconds: dict[str, float] = {}
    failures = 0
    for attempt, following in itertools.zip_longest(attempts, attempts[1:]):
        own = dict(attempt.seconds)
        if following is not None:
            steps, again = attempt.last - attempt.first, attempt.last - following.first
            if steps > 0 and again > 0:
                own["lost"] = own.get("step", 0.0) * min(1.0, again / steps)
                own["step"] = own.get("step", 0.0) - own["lost"]
            if not attempt.stopped:
                failures += 1
                own["down"] = max(0.0, following.begin - attempt.end)
        for kind, value in own.items():
            seconds[kind] = seconds.get(kind, 0.0) + value
    return Spent(seconds, len(attempts), failures)


def read_attempts(workdir: str | Path) -> list[Attempt]:
    """Those of WORKDIR/goodput.json; none where it cannot be read."""
    known = {field.name for field in dataclasses.fields(Attempt)}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        tree = json.loads((Path(workdir) / GOODPUT_FILE).read_text(encoding="utf-8"))
        return [Attempt(**{name: value for name, value in one.items() if name in known}) for one in tree["attempts"]]
    return []


class Account:
    """Counts the time of this attempt, and keeps it in the run's folder.

    begin  Unix time; None: now
    """

    def __init__(self, begin: float | None = None, clock: Callable[[], float] = time.time):
        self._path: Path | None = None
        self._clock = clock
        self._before: list[Attempt] = []
        self._begin = clock() if begin is None else begin
        self._first = self._last = 0
        self._kind, self._since = "start", self._begin
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._written = 0.0

    def begins_at(self, step: int, path: Path | None) -> None:
        """The step that the attempt goes on from, and the run's folder; None: nothing is kept."""
        self._path, self._first = path, step
        self._before = read_attempts(path) if path else []
        self.note(step)

    def becomes(self, kind: str) -> None:
        """From now on time is of this kind."""
        self._turn(kind)

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """The block's time is of this kind, not of the one around it."""
        outer = self._turn(kind)
        try:
            yield
        finally:
            self._turn(outer)

    def waited(self, seconds: float) -> None:
        """So much of the time of steps was waiting for data, with the devices idle."""
        self._seconds["data"] += seconds
        self._seconds["step"] -= seconds

    def spent(self) -> Spent:
        """Of the whole run until now."""
        return spent([*self._before, self._now(stopped=False)])

    def note(self, step: int, *, stopped: bool = False) -> None:
        """Keeps the account after `step` steps; rarely, unless the attempt ends in order. What cannot be written stops
        no run."""
        self._last = step
        now = self._clock()
        if self._path is None or (now - self._written < _REWRITE_S and not stopped):
            return
        self._written = now
        attempts = [dataclasses.asdict(one) for one in (*self._before, self._now(stopped=stopped))]
        with contextlib.suppress(OSError):
            write_text_atomically(self._path / GOODPUT_FILE, json.dumps({"attempts": attempts}) + "\n")

    def _turn(self, kind: str) -> str:
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    def _now(self, *, stopped: bool) -> Attempt:
        self._turn(self._kind)
        seconds = {kind: round(value, 4) for kind, value in self._seconds.items()}
        return Attempt(self._begin, self._clock(), self._first, self._last, stopped, seconds)


def process_began() -> float:
    """When this process began, in Unix time; now where the system does not tell."""
    now = time.time()
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        age = up - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - max(age, 0.0)


def shares(found: Spent) -> list[tuple[str, float, float]]:
    """(kind, seconds, share of the whole), the largest first, without what took no time."""
    total: Any = found.total or 1.0
    rows = [(kind, value, value / total) for kind, value in found.seconds.items() if value >= 0.05]
    return sorted(rows, key=lambda row: -row[1])
