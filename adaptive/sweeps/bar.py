"""How far a study is: on a terminal one line that is redrawn, elsewhere a line for each run."""

import sys
import time
from typing import TextIO

from adaptive.training.report.numbers import clock, compact

_BAR = 24  # cells
_BESIDE = 2e11  # what a run costs beside its steps, compilation and scoring, in FLOPs of the CPU of a laptop


class Bar:
    """Progress by the training FLOPs of the runs that are due; use as a context manager."""

    def __init__(self, runs: int, flops: float, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._total, self._done = flops + runs * _BESIDE, 0.0
        self._begin = time.monotonic()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=self._stream, flush=True)

    def at(self, name: str, flops: float) -> None:
        """The run `name` has done so many FLOPs."""
        if self._live:
            share = (self._done + flops) / self._total
            full = round(_BAR * share)
            left = self._left(share)
            text = f"{'━' * full}{'╌' * (_BAR - full)} {share:4.0%}  {name}{f'  {left} left' if left else ''}"
            print(f"\r\x1b[2K{text}", end="", file=self._stream, flush=True)

    def finished(self, name: str, flops: float, told: str) -> None:
        """The run `name` is done, with all its FLOPs."""
        self._done += flops + _BESIDE
        share = self._done / self._total
        left = self._left(share)
        self.say(
            f"{share:4.0%}  {name}: {told}, {compact(flops, 'FLOP')}{f'; {left} left' if left and share < 1 else ''}"
        )

    def _left(self, share: float) -> str:
        seconds = time.monotonic() - self._begin
        return clock(seconds * (1 - share) / share) if share > 0 else ""

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="", file=self._stream, flush=True)
