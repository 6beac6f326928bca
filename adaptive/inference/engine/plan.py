"""Which program an engine launches next: a pure function of how many rows wait for what."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["read", "pass", "turn", "token"]


class Launch(NamedTuple):
    """kind of a program, and its number of rows"""

    kind: Kind
    rows: int


class Sizes(NamedTuple):
    """Rows that programs can compute, ascending: a turn, a pass, and all that a token needs."""

    turns: Sequence[int]
    passes: Sequence[int] = ()
    tokens: Sequence[int] = ()


def expected(waiting: tuple[int, int], flying: Sequence[Launch]) -> tuple[int, int]:
    """(rows before another pass, rows before a turn) of which an engine can be sure behind launches whose results it
    has not read, from those behind the last whose results it has. Of a pass nobody knows yet who takes another; behind
    a turn nearly all rows enter again."""
    core, done = waiting
    for kind, rows in flying:
        if kind == "pass":
            core -= min(core, rows)
        elif kind == "turn":
            taken = min(done, rows)
            core, done = core + taken, done - taken
        elif kind == "read":
            core += 1
    return core, done


def choose(core: int, done: int, live: int, sizes: Sizes, flying: Sequence[Launch]) -> Launch | None:
    """The launch that computes most rows for what it costs; None: nothing waits, or it is better to know first.

    core, done  rows before another pass, and before a turn, of which the engine is sure
    live        rows that have a token, or will behind what flies, and want another behind that
    flying      launches whose results it has not read
    """
    if sizes.tokens and live <= sizes.tokens[-1] and all(kind in ("token", "read") for kind, _ in flying):
        return Launch("token", _least(sizes.tokens, live)) if live else None
    if done >= sizes.turns[-1]:
        return Launch("turn", sizes.turns[-1])
    if core >= sizes.passes[-1]:
        return Launch("pass", sizes.passes[-1])
    if flying or not core + done:
        return None
    if core > done:
        return Launch("pass", _least(sizes.passes, core))
    return Launch("turn", _least(sizes.turns, done))


def whole(live: int, sizes: Sizes) -> Launch | None:
    """The same where every launch computes all that a token needs."""
    return Launch("turn", _least(sizes.turns, live)) if live else None


def _least(sizes: Sequence[int], rows: int) -> int:
    """The least of the sizes, ascending, that holds so many rows, or the largest."""
    return next((size for size in sizes if size >= rows), sizes[-1])
