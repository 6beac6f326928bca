"""What follows from the runs of a ladder: differences, fits, controls, and a verdict in plain words, whatever it is."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive.sweeps.compare import Cell, Difference, Spread, cells, difference, spread_of
from adaptive.sweeps.fits import Fit, fit
from adaptive.sweeps.laws import Chinchilla, Curves, WorthOfRecursion
from adaptive.sweeps.runs import Outcome
from adaptive.sweeps.shuffled import least_loss

BASELINE = "vanilla"
PUBLISHED_PHI = 0.46  # arXiv 2604.21106: recursive, 20 effective layers
BELOW_CHANCE = 0.995  # of the least loss on shuffled text: what is below reads its targets
FAMILIES = {"vanilla": 0, "recursive": 1, "mor": 2, "moe": 3, "hnet": 4}  # colour of each

Key = tuple[str, int, float]  # variant, width, amount


class Ordering(NamedTuple):
    """lower has the lower loss at equal compute, says the source."""

    lower: str
    higher: str
    source: str


MOR = "MoR paper, 360M"
ORDERINGS = (
    Ordering("vanilla", "recursive2", MOR),
    Ordering("recursive2", "recursive3", MOR),
    Ordering("recursive3", "recursive4", MOR),
    Ordering("mor2", "vanilla", MOR),
    Ordering("mor2", "recursive2", MOR),
    Ordering("mor3", "recursive3", MOR),
    Ordering("mor4", "recursive4", MOR),
    Ordering("mor2", "mor3", MOR),
    Ordering("mor3", "mor4", MOR),
    Ordering("moe_tc", "vanilla", "OLMoE and others"),
    Ordering("moe_tc", "moe_ec", "OLMoE"),
    Ordering("hnet", "vanilla", "H-Net paper"),
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a page is made of.

    about     how the ladder is built, for the end of the page
    missing   names of runs that are not finished
    held_out  every so many documents of the text one is
    """

    about: str
    quick: bool
    match: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    held_out: int

    @functools.cached_property
    def text(self) -> list[Outcome]:
        """Runs on text as it is."""
        return [one for one in self.outcomes if not one.labels["control"]]

    @functools.cached_property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(one.labels["variant"] for one in sorted(self.text, key=order)))

    @functools.cached_property
    def widths(self) -> list[int]:
        return sorted({one.labels["width"] for one in self.text})

    @functools.cached_property
    def cells(self) -> dict[Key, Cell]:
        return cells(self.text, _key)

    @functools.cached_property
    def spread(self) -> Spread:
        return spread_of(self.text, _key)

    @property
    def shared(self) -> str:
        return "equal compute" if self.match == "compute" else "equal data"

    def difference(self, lower: str, higher: str, width: int) -> Difference | None:
        """Loss of the one less that of the other at amount 1; None where one of them is missing."""
        a, b = self.cells.get((lower, width, 1.0)), self.cells.get((higher, width, 1.0))
        return None if a is None or b is None else difference(a, b, self.spread)

    def best(self, width: int) -> str:
        """The variant with the lowest loss at amount 1."""
        losses = {key[0]: cell.loss for key, cell in self.cells.items() if key[1:] == (width, 1.0)}
        return min(losses, key=lambda name: losses[name], default="none")

    @functools.cached_property
    def worths(self) -> dict[str, Fit]:
        """phi of each family of recursions, fitted to its runs and those of the baseline."""
        found = {}
        for family in ("recursive", "mor"):
            some = [one for one in self.text if _family(one) in (BASELINE, family)]
            if len(some) > 6 and any(_family(one) == family for one in some):
                once, shared, passes, tokens = (_array(some, name) for name in ("once", "shared", "passes", "tokens"))
                found[family] = fit(WorthOfRecursion(once, shared, passes, tokens), _losses(some), _variants(some))
        return found

    @functools.cached_property
    def curves(self) -> Fit | None:
        """Of loss against compute, of runs at amount 1; None where they are too few, or do not say how steep it is."""
        some = [one for one in sorted(self.text, key=order) if one.labels["amount"] == 1.0]
        names = _variants(some)
        if BASELINE not in names or len(self.widths) < 2 or len(some) < len(set(names)) + 3:
            return None
        found = fit(Curves(names, _array(some, "flops")), _losses(some), names)
        return None if found.at_limit("alpha") else found

    @functools.cached_property
    def chinchilla(self) -> Fit | None:
        some = [one for one in self.text if one.labels["variant"] == BASELINE]
        if len(some) < 7:
            return None
        sizes = _array(some, "once") + _array(some, "shared")
        return fit(Chinchilla(sizes, _array(some, "tokens")), _losses(some))


def _key(one: Outcome) -> Key:
    return one.labels["variant"], one.labels["width"], one.labels["amount"]


def order(one: Outcome) -> tuple[int, str]:
    return FAMILIES.get(_family(one), 9), one.labels["variant"]


def _family(one: Outcome) -> str:
    return family_of(one.labels["variant"])


def family_of(variant: str) -> str:
    return variant.rstrip("0123456789").partition("_")[0]


def _array(some: Sequence[Outcome], name: str) -> np.ndarray:
    return np.array([one.labels[name] if name in one.labels else getattr(one, name) for one in some], np.float64)


def _losses(some: Sequence[Outcome]) -> np.ndarray:
    return np.array([one.loss for one in some])


def _variants(some: Sequence[Outcome]) -> list[str]:
    return [one.labels["variant"] for one in some]


class Control(NamedTuple):
    variant: str
    rule: str
    loss: float
    least: float

    @property
    def below(self) -> bool:
        return self.loss < BELOW_CHANCE * self.least


def controls(c: Contents) -> list[Control]:
    some = [one for one in c.outcomes if one.labels["control"]]
    least = least_loss(c.held_out) if some else 0.0
    return [
        Control(one.labels["variant"], {"train": "as trained", "causal": "causal"}[rule], told["loss"], least)
        for one in sorted(some, key=order)
        for rule, told in one.told.items()
    ]


def verdicts(c: Contents) -> list[str]:
    """Sentences in Markdown, the most telling first."""
    out = [f"**φ of {name} models is {worth_in_words(one)}.**" for name, one in c.worths.items()]
    seen, reverse, within = sorted_orderings(c)
    if total := len(seen) + len(reverse) + len(within):
        parts = (
            f"{len(seen)} of {total} appear{_names(seen)}",
            f"{len(reverse)} the other way round{_names(reverse)}",
            f"{len(within)} within chance{_names(within)}",
        )
        out.append(f"Orderings that papers print, at the greatest width here (w{c.widths[-1]}): {', '.join(parts)}.")
    best = (f"{c.best(width)} (w{width})" for width in c.widths)
    out.append(f"Lowest loss at {c.shared}: {', '.join(best)}.")
    rows = controls(c)
    below = [f"{one.variant}, {one.rule}" for one in rows if one.below]
    if below:
        out.append(f"**On shuffled text below what is possible: {'; '.join(below)}.** Such a loss is no prediction.")
    elif rows:
        out.append("On shuffled text no model is better than is possible, however it selects.")
    return out


def _names(some: Sequence[str]) -> str:
    return f" ({', '.join(some)})" if some else ""


def worth_in_words(one: Fit) -> str:
    """What an interval of phi means."""
    low, high = one.interval("phi")
    shown = f"{one['phi']:.2f} [{low:.2f}, {high:.2f}]"
    if one.at_limit("phi"):
        return f"{shown}, not determined by these runs: the interval ends where the search does"
    nothing, fresh = low <= 0 <= high, low <= 1 <= high
    if nothing and fresh:
        what = "a recursion can be told neither from one pass nor from fresh layers"
    elif nothing:
        what = "a recursion adds no capacity that can be told from none, and is not worth fresh layers"
    elif fresh:
        what = "a recursion adds capacity, and cannot be told from fresh layers"
    elif low > 1:
        what = "a recursion is worth more than fresh layers"
    elif high < 0:
        what = "a recursion takes capacity away"
    else:
        what = "a recursion adds capacity, and less than fresh layers would"
    where = "inside" if low <= PUBLISHED_PHI <= high else "outside"
    return f"{shown}: {what}; the published {PUBLISHED_PHI} is {where}"


def sorted_orderings(c: Contents) -> tuple[list[str], list[str], list[str]]:
    """At the greatest width: those that appear, that are the other way round, and that are within chance."""
    found: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for one in ORDERINGS:
        d = c.difference(one.lower, one.higher, c.widths[-1])
        if d is not None:
            found[d.sign].append(f"{one.lower} < {one.higher}")
    return found[-1], found[1], found[0]
