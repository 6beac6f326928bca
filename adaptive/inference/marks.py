"""Generated text as it comes, with marks where the chunks of an H-Net begin."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.stops import Part, Stops
from adaptive.printable import printable

MARKS = "|\u2016\u2980"  # of stages 0, 1, 2 and deeper: one, two, three strokes
_COLOURS = ("\x1b[36m", "\x1b[1;33m", "\x1b[1;35m")
_PLAIN = "\x1b[0m"


class Tally(NamedTuple):
    """Bytes of text, and chunks of each stage that begin at one of them."""

    bytes: int
    chunks: tuple[int, ...]


class Writer:
    """Tokens of one row to text. A character waits until all its bytes have come, and so do marks inside it, which are
    put before the character.

    marks   show where chunks begin
    colour  in colours of a terminal
    safe    control characters are shown and not done (`adaptive.printable`)
    stops   texts of which the first, but for those of a prompt, ends the row, and is not shown
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        marks: bool = False,
        colour: bool = False,
        safe: bool = False,
        stops: Sequence[str] = (),
    ):
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._marks, self._colour, self._safe = marks, colour, safe
        self._stops = Stops(stops)
        self._deepest = 0  # stages with a boundary since the last text that was shown
        self._bytes, self._chunks = 0, np.zeros(0, int)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the row: nothing is shown any more."""
        return self._stops.reached

    def push(self, tokens: np.ndarray, boundaries: np.ndarray, *, prompt: bool = False) -> str:
        """What can be shown after tokens i32[n] with boundaries bool[stages, n]."""
        shown: list[Part] = []
        for i, token in enumerate(tokens.tolist()):
            size = len(self._tokenizer.token_bytes(token))
            if (
                size
            ):  # a chunk that begins with a special token, such as the begin of a document, has no place in a text
                self._deepest = max(self._deepest, int(boundaries[:, i].sum()))
                self._bytes += size
                self._chunks = boundaries[:, i] + (self._chunks if len(self._chunks) else 0)
            if text := self._stream.push(token):
                part = Part(self._mark(), text)
                shown += [part] if prompt else self._stops.push(part)
                self._deepest = 0
        return self._shown(shown)

    def finish(self) -> str:
        return self._shown([*self._stops.push(Part("", self._stream.finish())), *self._stops.finish()])

    def tally(self) -> Tally:
        return Tally(self._bytes, tuple(self._chunks.tolist()))

    def _shown(self, parts: Sequence[Part]) -> str:
        return "".join(mark + (printable(text) if self._safe else text) for mark, text in parts)

    def _mark(self) -> str:
        return mark(self._deepest - 1, self._colour) if self._marks and self._deepest else ""


def mark(stage: int, colour: bool) -> str:
    """The mark of a chunk of this stage, which is one of every stage outside as well."""
    at = min(stage, len(MARKS) - 1)
    return f"{_COLOURS[at]}{MARKS[at]}{_PLAIN}" if colour else MARKS[at]


def legend(stages: int, colour: bool) -> str:
    names = ", ".join(f"{mark(s, colour)} stage {s}" for s in range(stages))
    nested = "; the mark of a deeper stage stands for those before it as well" if stages > 1 else ""
    return f"where chunks begin: {names}{nested}"


def together(tallies: Sequence[Tally]) -> Tally:
    stages = max((len(t.chunks) for t in tallies), default=0)
    chunks = tuple(sum(t.chunks[s] for t in tallies if t.chunks) for s in range(stages))
    return Tally(sum(t.bytes for t in tallies), chunks)
