"""What a user sees of generation: the text on standard output, what it took on standard error."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from adaptive.account import account, dense_equivalent
from adaptive.inference.marks import Writer, legend, together
from adaptive.runs.load import Trained


class Show:
    """Prints what comes and tells at the end what it took.

    rows   texts that are continued together: one is shown as it is made, several at the end
    begin  when the command began, by `time.perf_counter`
    marks  whether to mark where chunks begin
    """

    def __init__(self, trained: Trained, rows: int, begin: float, *, marks: bool):
        self._trained, self._begin, self._marks = trained, begin, marks
        self._stages = len(trained.recipe.model.facts().chunking)
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._writers = [Writer(trained.tokenizer, marks=marks, colour=self._colour) for _ in range(rows)]
        self._texts = [""] * rows
        self._made: list[tuple[float, int]] = []  # when a piece came, and its tokens

    def all(self, pieces: Iterator[Any]) -> bool:
        """Shows all pieces; whether Ctrl-C ended them."""
        interrupted = False
        if self._marks:
            print(legend(self._stages, self._colour) + "\n", flush=True)
        try:
            for piece in pieces:
                self._add(piece)
        except KeyboardInterrupt:
            interrupted = True
        for r, writer in enumerate(self._writers):
            self._put(r, writer.finish())
        if len(self._writers) == 1:
            print(flush=True)
        else:
            print("\n\n".join(f"--- {r + 1} of {len(self._texts)}\n{t}" for r, t in enumerate(self._texts)), flush=True)
        self._report(interrupted)
        return interrupted

    def _add(self, piece: Any) -> None:
        if not piece.prompt:
            self._made.append((time.perf_counter(), int(piece.valid.sum())))
        for r, writer in enumerate(self._writers):
            there = piece.valid[r]
            self._put(r, writer.push(piece.tokens[r, there], piece.boundaries[:, r, there]))

    def _put(self, row: int, text: str) -> None:
        if len(self._writers) == 1:
            print(text, end="", flush=True)
        else:
            self._texts[row] += text

    def _report(self, interrupted: bool) -> None:
        first = self._made[0][0] if self._made else time.perf_counter()
        line = f"{sum(n for _, n in self._made)} tokens, the first after {first - self._begin:.1f} s"
        later, seconds = sum(n for _, n in self._made[1:]), self._made[-1][0] - first if self._made else 0.0
        if later and seconds > 0:
            line += f", then {later / seconds:.0f} per second"
            if len(self._writers) > 1:
                line += f" over {len(self._writers)} rows"
        tell(("interrupted: " if interrupted else "") + line)
        if self._stages:
            self._report_chunks()

    def _report_chunks(self) -> None:
        total = together([writer.tally() for writer in self._writers])
        if not total.bytes or not all(total.chunks):
            return
        sizes = ", ".join(f"stage {s} {total.bytes / n:.2f}" for s, n in enumerate(total.chunks))
        model, length = self._trained.recipe.model, total.bytes / len(self._writers)
        taken = [n / len(self._writers) for n in total.chunks]
        cost = account(model, round(length), taken).forward_flops_per_token
        whole = dense_equivalent(model, round(length)).forward_flops_per_token
        tell(f"bytes per chunk: {sizes}; {cost / 1e6:.3g} MFLOP per byte, {cost / whole:.0%} of a chunk at every byte")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
