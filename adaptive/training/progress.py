"""What a person sees while a run goes on: its rows as lines, and on a terminal a live line below them."""

import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from adaptive.training.report.numbers import clock, compact, percent

_BAR = 24  # cells


class Progress:
    """Shows how far a run is. Use as a context manager, or call `close`.

    Rows are printed as lines. On a terminal they are cut to its width and scroll above one line that is redrawn; files,
    pipes and TERM=dumb have none. NO_COLOR is respected.

    total_steps   of the whole run
    start_step    where this attempt began
    stream        where to; None: standard output
    enabled       False on processes other than 0, which say nothing
    plain_every   print one in so many training rows (evaluations are always printed)
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        plain_every: int = 1,
    ):
        self._total, self._step = total_steps, start_step
        self._enabled, self._every = enabled, plain_every
        self._rows = 0
        self._row: Mapping[str, Any] = {}
        self._first: tuple[int, float] | None = None
        self._activity = "starting"
        self._lock = threading.RLock()
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        if enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=lambda: _Line(self), console=self._console, refresh_per_second=4, transient=True
            )
            self._live.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the live line; what has scrolled stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line of the log, above the live line. May be called from any thread."""
        if self._enabled:
            with self._lock:
                self._console.print(Text(text))
                self._console.file.flush()

    def doing(self, activity: str) -> None:
        """What goes on that is no training step ("compiling", "evaluating"); "" when steps go on."""
        self._activity = activity

    def step(self, step: int) -> None:
        """The step now running, between rows."""
        self._step = step

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, of either kind."""
        self._step = max(self._step, int(row["step"]))
        if any(name.startswith("eval/") for name in row):
            self.say(evaluation_line(row, self._total))
            return
        self._row, self._activity = row, ""
        if "seconds" in row:
            self._first = self._first or (row["step"], row["seconds"])
        if self._rows % self._every == 0:
            room = self._console.width - 1 if self._live is not None else None
            self.say(plain_line(row, self._total, self.seconds_left(), room))
        self._rows += 1

    def seconds_left(self) -> float | None:
        """From the pace since this attempt's first row, pauses for evaluation included; None before any pace."""
        left = self._total - int(self._row.get("step", self._step))
        if self._first and self._row.get("step", 0) > self._first[0]:
            steps, seconds = self._row["step"] - self._first[0], self._row["seconds"] - self._first[1]
            return left * seconds / steps
        return left * self._row["step_ms"] / 1e3 if self._row.get("step_ms") else None


def plain_line(row: Mapping[str, Any], total: int, seconds_left: float | None, room: int | None = None) -> str:
    """A training row as one line, of at most `room` cells where that is not None: measures leave from the end."""
    counter = f"step {row['step']}/{total}"
    left = [] if seconds_left is None else [f"{clock(seconds_left)} left"]
    return "  ".join([counter, *_that_fit(list(_measures(row)), [counter, *left], room, "  "), *left])


def _that_fit(measures: list[str], others: list[str], room: int | None, between: str) -> list[str]:
    """The first of the measures: as many as have room beside the others."""
    while room is not None and measures and len(between.join([*others, *measures])) > room:
        measures = measures[:-1]
    return measures


def evaluation_line(row: Mapping[str, Any], total: int) -> str:
    """An evaluation's row as one line: held-out loss, and under the other ways to select in parentheses."""
    parts = [f"step {row['step']}/{total}  held-out"]
    if row.get("eval/loss") is not None:
        parts.append(f"loss {row['eval/loss']:.4f}")
    if row.get("eval/bits_per_byte") is not None:
        parts.append(f"{row['eval/bits_per_byte']:.4f} bits/byte")
    for name, value in row.items():
        match name.split("/"):
            case ["eval", selection, "bits_per_byte"] if value is not None:
                parts.append(f"({selection} {value:.4f})")
    if row.get("eval/routing/bytes_per_chunk") is not None:
        parts.append(f"{row['eval/routing/bytes_per_chunk']:.2f} bytes/chunk")
    if row.get("eval/routing/accuracy") is not None:
        parts.append(f"sampling accuracy {percent(row['eval/routing/accuracy'])}")
    return "  ".join(parts)


def _measures(row: Mapping[str, Any]) -> Iterator[str]:
    """What a row says about a step, the most telling first."""
    if row.get("ce", row.get("loss")) is not None:
        yield f"loss {row.get('ce', row.get('loss')):.3f}"
    elif "loss" in row:
        yield "loss not finite"
    if row.get("bits_per_byte") is not None:
        yield f"{row['bits_per_byte']:.3f} bits/byte"
    if row.get("routing/bytes_per_chunk") is not None:
        yield f"{row['routing/bytes_per_chunk']:.2f} bytes/chunk"
    lost = [value or 0.0 for name, value in row.items() if name.startswith("routing/overflow_")]
    if max(lost, default=0.0) > 0.005:
        yield f"overflow {max(lost):.0%}"
    if row.get("tokens_per_s") is not None:
        yield f"{compact(row['tokens_per_s'])} tok/s"
    if row.get("mfu_active") is not None:
        yield f"MFU {row['mfu_active']:.0%}"
    if row.get("skipped"):
        yield f"{row['skipped']} skipped"
    load, without = row.get("experts/load_max_over_mean"), row.get("experts/without_expert")
    if load is not None and load > 1.005:
        yield f"max/mean load {load:.2f}"
    elif load is not None and without is not None:  # where loads are even by construction
        yield f"{percent(without)} without expert"


class _Line:
    """The live line, cut to the terminal's width: measures leave from the end, then the bar."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        p = self._progress
        counter = f"step {p._step}/{p._total}"
        activity = [p._activity] if p._activity else []
        left = [] if p.seconds_left() is None else [f"{clock(p.seconds_left())} left"]
        room = options.max_width - 1
        measures = _that_fit(list(_measures(p._row)), [counter, *activity, *left], room, " · ")
        text = " · ".join([counter, *activity, *measures, *left])
        line = Text(no_wrap=True, overflow="ellipsis")
        if len(text) + _BAR + 1 <= room:
            full = round(_BAR * p._step / max(1, p._total))
            line.append("━" * full, "cyan").append("━" * (_BAR - full) + " ", "bright_black")
        line.append(counter, "bold")
        for part in (*activity, *measures, *left):
            line.append(" · ", "bright_black").append(part, "yellow" if part in activity else "")
        yield line
