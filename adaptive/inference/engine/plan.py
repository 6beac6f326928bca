"""Which program an engine launches next: a pure function of how many rows wait for what."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["read", "pass", "turn"]


class Launch(NamedTuple):
    """kind of a program, and its number of rows"""

    kind: Kind
    rows: int


def expected(waiting: tuple[int, int], flying: Sequence[Launch], passes: int) -> tuple[int, int]:
    """(rows before another pass, rows before a turn) of which an engine can be sure behind launches whose results it
    has not read, from those behind the last whose results it has. Of a pass nobody knows yet who takes another; behind
    a turn nearly all rows enter again."""
    core, done = waiting
    for kind, rows in flying:
        if kind == "pass":
            core -= min(core, rows)
        elif kind == "turn":
            taken = min(done, rows)
            core, done = (core + taken, done - taken) if passes else (core, done)
        else:
            core, done = (core + 1, done) if passes else (core, done + 1)
    return core, done


def choose(core: int, done: int, turns: Sequence[int], batches: Sequence[int], *, sure: bool) -> Launch | None:
    """The launch that computes most rows for what it costs; None: nothing waits, or it is better to know first.

    core, done  rows before another pass, and before a turn
    turns, batches  rows that a turn and a pass can compute, ascending
    sure        whether these are all; otherwise there may be more
    """
    if done >= turns[-1]:
        return Launch("turn", turns[-1])
    if batches and core >= batches[-1]:
        return Launch("pass", batches[-1])
    if not sure or not core + done:
        return None
    if core > done:
        return Launch("pass", _least(batches, core))
    return Launch("turn", _least(turns, done))


def _least(sizes: Sequence[int], rows: int) -> int:
    """The least of the sizes, ascending, that holds so many rows, or the largest."""
    return next((size for size in sizes if size >= rows), sizes[-1])
