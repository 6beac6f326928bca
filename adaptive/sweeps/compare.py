"""Differences between runs, and whether they are more than chance: that of the documents, which are the same for both,
and that of the seed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from adaptive.sweeps.fits import interval
from adaptive.sweeps.runs import Outcome

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone: their mean, and f64[resamples] the mean in each resample of documents."""

    loss: float
    drawn: np.ndarray
    seeds: int


class Spread(NamedTuple):
    """Standard deviation of the loss over seeds, as a share of it, from runs with `freedom` degrees of freedom; 0: not
    known."""

    share: float
    freedom: int


class Difference(NamedTuple):
    """Nats per token, with the interval that holds 95 %."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where chance does not explain it, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def thousandths(self) -> str:
        """In thousandths of a nat, as pages have it."""
        return f"{1e3 * self.value:+.0f} [{1e3 * self.low:+.0f}, {1e3 * self.high:+.0f}]"


def cells(outcomes: Sequence[Outcome], key: Callable[[Outcome], Key]) -> dict[Key, Cell]:
    groups: dict[Key, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(key(one), []).append(one)
    return {
        name: Cell(float(np.mean([one.loss for one in some])), np.mean([one.losses for one in some], axis=0), len(some))
        for name, some in groups.items()
    }


def spread_of(outcomes: Sequence[Outcome], key: Callable[[Outcome], Key]) -> Spread:
    """That of all runs of which there are several seeds, pooled."""
    groups: dict[Key, list[float]] = {}
    for one in outcomes:
        groups.setdefault(key(one), []).append(math.log(one.loss))
    several = [some for some in groups.values() if len(some) > 1]
    freedom = sum(len(some) - 1 for some in several)
    squares = sum(float(np.var(some)) * len(some) for some in several)
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else Spread(0.0, 0)


def difference(a: Cell, b: Cell, spread: Spread) -> Difference:
    """a - b: of paired resamples of documents, with the noise of seeds, as little as is known of it, added to each."""
    drawn = a.drawn - b.drawn
    if spread.freedom:
        rng = np.random.default_rng(0)
        size = spread.share * (a.loss + b.loss) / 2 * math.sqrt(1 / a.seeds + 1 / b.seeds)
        drawn = drawn + size * rng.standard_t(spread.freedom, len(drawn))
    return Difference(a.loss - b.loss, *interval(drawn))
