"""Generated text as it comes, with marks where the chunks of an H-Net begin and where tokens of another depth do."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.stops import Part, Stops
from adaptive.printable import printable

MARKS = "|\u2016\u2980"  # of stages 0, 1, 2 and deeper: one, two, three strokes
_COLOURS = ("\x1b[36m", "\x1b[1;33m", "\x1b[1;35m")
_PLAIN = "\x1b[0m"
_SMALL = str.maketrans("0123456789", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
_BELOW = str.maketrans("-0123456789", "\u208b\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089")
_GROUNDS = (17, 22, 52, 54, 58, 23, 88, 25, 94, 29, 90, 60)  # of 256 colours, behind the text: one for each expert
_SHADES = (250, 110, 75, 208, 196)  # of 256 colours, from the fewest passes to the most


class Tally(NamedTuple):
    """Bytes of text, and chunks of each stage that begin at one of them."""

    bytes: int
    chunks: tuple[int, ...]


class Writer:
    """Tokens of one row to text. A character waits until all its bytes have come, and so do marks inside it, which are
    put before the character.

    marks   show where chunks begin
    depths  show how many passes each token took: 0: no; else the most that there are
    experts show the strongest expert of each token
    colour  in colours of a terminal
    safe    control characters are shown and not done (`adaptive.printable`)
    stops   texts of which the first, but for those of a prompt, ends the row, and is not shown
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        marks: bool = False,
        depths: int = 0,
        experts: bool = False,
        colour: bool = False,
        safe: bool = False,
        stops: Sequence[str] = (),
    ):
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._marks, self._colour, self._safe = marks, colour, safe
        self._stops = Stops(stops)
        self._depths, self._depth = depths, -1  # of the last text that was shown
        self._experts, self._expert = experts, -2
        self._deepest = 0  # stages with a boundary since the last text that was shown
        self._bytes, self._chunks = 0, np.zeros(0, int)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the row: nothing is shown any more."""
        return self._stops.reached

    def push(
        self,
        tokens: np.ndarray,
        boundaries: np.ndarray,
        depth: np.ndarray | None = None,
        expert: np.ndarray | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """What can be shown after tokens i32[n] with boundaries bool[stages, n], depth and expert i32[n]."""
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
                shades = self._shade(None if depth is None else int(depth[i]))
                shades += self._ground(None if expert is None else int(expert[i]))
                part = Part(self._mark() + shades, text)
                shown += [part] if prompt else self._stops.push(part)
                self._deepest = 0
        return self._shown(shown)

    def finish(self) -> str:
        rest = self._shown([*self._stops.push(Part("", self._stream.finish())), *self._stops.finish()])
        return rest + _PLAIN * (self._colour and (self._depth >= 0 or self._expert > -2))

    def tally(self) -> Tally:
        return Tally(self._bytes, tuple(self._chunks.tolist()))

    def _shown(self, parts: Sequence[Part]) -> str:
        return "".join(mark + (printable(text) if self._safe else text) for mark, text in parts)

    def _mark(self) -> str:
        return mark(self._deepest - 1, self._colour) if self._marks and self._deepest else ""

    def _shade(self, depth: int | None) -> str:
        """What goes before the text of a token that took so many passes; nothing where the one before took as many."""
        if not self._depths or depth is None or (depth == self._depth and not self._ended()):
            return ""
        self._depth = depth
        return shade(depth, self._depths, self._colour)

    def _ground(self, expert: int | None) -> str:
        """The same of its strongest expert."""
        if not self._experts or expert is None or (expert == self._expert and not self._ended()):
            return ""
        self._expert = expert
        return ground(expert, self._colour)

    def _ended(self) -> bool:
        """Whether the mark of a chunk ended all colours."""
        return self._marks and self._colour and self._deepest > 0


def mark(stage: int, colour: bool) -> str:
    """The mark of a chunk of this stage, which is one of every stage outside as well."""
    at = min(stage, len(MARKS) - 1)
    return f"{_COLOURS[at]}{MARKS[at]}{_PLAIN}" if colour else MARKS[at]


def shade(depth: int, most: int, colour: bool) -> str:
    """The mark from which on tokens took `depth` passes, of which there are `most`."""
    if not colour:
        return str(depth).translate(_SMALL)
    at = round((depth - 1) / max(1, most - 1) * (len(_SHADES) - 1))
    return f"\x1b[38;5;{_SHADES[min(max(at, 0), len(_SHADES) - 1)]}m"


def ground(expert: int, colour: bool) -> str:
    """The mark from which on this expert was the strongest; -1: none computed the token."""
    if not colour:
        return (str(expert) if expert >= 0 else "-").translate(_BELOW)
    return f"\x1b[48;5;{_GROUNDS[expert % len(_GROUNDS)]}m" if expert >= 0 else "\x1b[49m"


def expert_legend(experts: int, colour: bool) -> str:
    shown = min(experts, len(_GROUNDS)) if colour else min(experts, 4)
    names = ", ".join(ground(e, colour) + (f" {e} {_PLAIN}" if colour else "") for e in range(shown))
    more = (", and again" if colour else ", ...") if experts > shown else ""
    where = "" if colour else ", where another one begins"
    return f"strongest expert of each token in the last layer that has any for it{where}: {names}{more}"


def depth_legend(most: int, colour: bool) -> str:
    names = ", ".join(shade(d, most, colour) + (f"{d}{_PLAIN}" if colour else "") for d in range(1, most + 1))
    return f"passes of each token{'' if colour else ', where another number begins'}: {names}"


def legend(stages: int, colour: bool) -> str:
    names = ", ".join(f"{mark(s, colour)} stage {s}" for s in range(stages))
    nested = "; the mark of a deeper stage stands for those before it as well" if stages > 1 else ""
    return f"where chunks begin: {names}{nested}"


def together(tallies: Sequence[Tally]) -> Tally:
    stages = max((len(t.chunks) for t in tallies), default=0)
    chunks = tuple(sum(t.chunks[s] for t in tallies if t.chunks) for s in range(stages))
    return Tally(sum(t.bytes for t in tallies), chunks)
