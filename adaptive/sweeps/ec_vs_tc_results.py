"""What follows from the runs of ec_vs_tc: differences, speeds, and a verdict in plain words, whatever it is."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive.sweeps.compare import Cell, Difference, Spread, cells, difference, spread_of
from adaptive.sweeps.denoising import RULE
from adaptive.sweeps.runs import Outcome

TC, EC, LOW = "tc", "ec", "ec_linear_reverse"  # token choice, expert choice, more capacity at low masked shares
RETROFIT_PARTS = ("tc_continued", "ec_retrofit", "ec_retrofit_linear_reverse")
STABLE = 0.8  # of a run, behind which its learning rate falls


class Speed(NamedTuple):
    """How many times fewer steps a variant needs than token choice, mean and extremes over seeds; and the same in
    seconds of training."""

    steps: float
    low: float
    high: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a page is made of.

    about    how the study is built, for the end of the page
    missing  names of runs that are not finished
    """

    about: str
    quick: bool
    match: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]

    @functools.cached_property
    def cells(self) -> dict[str, Cell]:
        return cells(self.outcomes, _variant)

    @functools.cached_property
    def spread(self) -> Spread:
        return spread_of(self.outcomes, _variant)

    @property
    def seeds(self) -> int:
        return max((one.seeds for one in self.cells.values()), default=0)

    def variants(self, part: str) -> list[str]:
        """Those of a part ("first", "later") in the order of the study."""
        return list(dict.fromkeys(one.labels["variant"] for one in self.outcomes if one.labels["part"] == part))

    def of(self, variant: str) -> list[Outcome]:
        return [one for one in self.outcomes if one.labels["variant"] == variant]

    def difference(self, a: str, b: str) -> Difference | None:
        """The loss of a less that of b; None where one has no run."""
        if a not in self.cells or b not in self.cells:
            return None
        return difference(self.cells[a], self.cells[b], self.spread)

    def mean(self, variant: str, *path: str | int) -> float | None:
        """Over seeds, of a number that runs tell."""
        found = [_at(one.told[RULE], path) for one in self.of(variant)]
        known = [float(value) for value in found if value is not None]
        return float(np.mean(known)) if known else None

    def curve(self, variant: str) -> list[tuple[float, float]]:
        """(training FLOPs, held-out loss), means over seeds."""
        found = [(one.flops / last_step(one), one.told[RULE]["curve"]) for one in self.of(variant)]
        steps = sorted({step for _, curve in found for step, _ in curve if step})
        out = []
        for step in steps:
            values = [loss for _, curve in found for at, loss in curve if at == step]
            if len(values) == len(found):
                out.append((step * found[0][0], float(np.mean(values))))
        return out

    def speed(self, variant: str) -> Speed | None:
        """None where a run never has token choice's loss."""
        base = {one.labels["seed"]: one for one in self.of(TC)}
        ratios, seconds = [], []
        for one in self.of(variant):
            other = base.get(one.labels["seed"])
            target = None if other is None else stable_end(other)
            if other is None or target is None:
                continue
            step, loss = target
            reached = first_step(one.told[RULE]["curve"], loss)
            if reached is None:
                return None
            ratios.append(step / reached)
            own, theirs = (run.told[RULE]["tokens_per_s"] or math.nan for run in (one, other))
            seconds.append(step / reached * own / theirs)
        if not ratios:
            return None
        mean = lambda values: float(np.exp(np.mean(np.log(values))))  # noqa: E731
        return Speed(mean(ratios), min(ratios), max(ratios), mean(seconds))


def last_step(one: Outcome) -> int:
    """How many steps a run has."""
    return int(one.told[RULE]["curve"][-1][0])


def stable_end(one: Outcome) -> tuple[int, float] | None:
    """(step, loss) of a run's last evaluation before its learning rate falls."""
    curve = [(step, loss) for step, loss in one.told[RULE]["curve"] if step and step <= STABLE * last_step(one)]
    return curve[-1] if curve else None


def first_step(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Where a curve of [step, loss] first is as low, between evaluations by a straight line."""
    before: Sequence[float] | None = None
    for step, value in curve:
        if value <= loss and step:
            if before is None or before[1] <= value:
                return float(step)
            return float(before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value))
        before = (step, value)
    return None


def verdicts(c: Contents) -> list[str]:
    return [*_convergence(c), *_capacity(c), *_retrofit(c)]


def _convergence(c: Contents) -> list[str]:
    d = c.difference(EC, TC)
    if d is None:
        return ["**Convergence:** not known yet."]
    words = {-1: "ends lower", 0: "ends within chance of it", 1: "ends higher"}[d.sign]
    speed = c.speed(EC)
    told = "It never has the loss that token choice has before its rate falls."
    if speed is not None:
        claim = "the claimed factor is 2, of time on 8 GPUs"
        told = (
            f"It has the loss that token choice has before its rate falls after {1 / speed.steps:.2f} of the steps "
            f"({1 / speed.high:.2f} to {1 / speed.low:.2f} over seeds): {speed.steps:.2f} times as fast, and "
            f"{speed.seconds:.2f} times in seconds here; {claim}."
        )
    best = [name for name in c.variants("first") if name.startswith(TC) and name != TC and name in c.cells]
    others = [(name, c.difference(EC, name)) for name in best]
    beaten = [name for name, one in others if one is not None and one.sign < 0]
    against = (
        f" Of {len(others)} other kinds of token choice it is below {len(beaten)} beyond chance." if others else ""
    )
    return [f"**Convergence:** expert choice {words} at equal compute, {d.thousandths()} thousandths. {told}{against}"]


def _capacity(c: Contents) -> list[str]:
    d = c.difference(LOW, EC)
    if d is None:
        return ["**Capacity where little is hidden:** not known yet."]
    words = {-1: "helps", 0: "makes no difference beyond chance", 1: "hurts"}[d.sign]
    schedules = [name for name in c.variants("first") if name.startswith(f"{EC}_") and name in c.cells]
    order = sorted([*schedules, EC], key=lambda name: c.cells[name].loss)
    told = f"From the lowest loss: {', '.join(order)}." if len(order) > 2 else ""
    ours = "static" if order[0] == EC else order[0].removeprefix(f"{EC}_")
    return [
        f"**Capacity where little is hidden:** linear_reverse {words} against the static budget at equal average "
        f"compute, {d.thousandths()} thousandths. {told} The lowest is {ours}; the paper's is linear_reverse."
    ]


def _retrofit(c: Contents) -> list[str]:
    continued, replaced, scheduled = RETROFIT_PARTS
    d = c.difference(replaced, continued)
    before, after = c.mean(replaced, "begun", 0), c.mean(replaced, "begun", 1)
    if d is None or before is None or after is None:
        return ["**Retrofit:** not known yet."]
    words = {-1: "pays", 0: "neither pays nor costs beyond chance", 1: "does not pay"}[d.sign]
    own = c.difference(scheduled, continued)
    more = f"; with linear_reverse {own.thousandths()}" if own is not None else ""
    return [
        f"**Retrofit:** replacing the routers takes the loss from {before:.4f} to {after:.4f} at once. After the same "
        f"further steps it {words} against going on with token choice, {d.thousandths()} thousandths{more}."
    ]


def _variant(one: Outcome) -> str:
    return str(one.labels["variant"])


def _at(told: Any, path: Sequence[str | int]) -> Any:
    for name in path:
        if isinstance(name, str):
            told = told.get(name) if isinstance(told, dict) else None
        else:
            told = told[name] if told is not None else None
    return told
