"""Loss against depth, from one checkpoint: every number of passes through a shared block, and what the curve says."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptive.errors import RecipeError
from adaptive.evaluation import bootstrap
from adaptive.evaluation.bootstrap import interval
from adaptive.evaluation.cost import recursion_of
from adaptive.evaluation.evaluate import Measured, Say, macro, measure
from adaptive.evaluation.sets import EvaluationSet
from adaptive.evaluation.subject import Subject
from adaptive.recipe import Recipe

SAME = 0.002  # nats per token: smaller differences are none


def check_depths(recipe: Recipe, depths: Sequence[int]) -> None:
    """Raises RecipeError where the model cannot be evaluated at one of these numbers of passes."""
    body = recursion_of(recipe.model)
    if body is None or recipe.model.facts().recursions < 2:
        raise RecipeError(
            f"--depths: {recipe.name} has no recursion: every token goes through all layers once, and no other depth "
            "can be chosen"
        )
    for passes in depths:
        if reason := body.refuse_passes(passes):
            raise RecipeError(f"--depths {passes}: {reason}")


def depth_curve(
    subject: Subject,
    sets: Sequence[EvaluationSet],
    depths: Sequence[int],
    *,
    most: int = 0,
    resamples: int = bootstrap.RESAMPLES,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Loss and bits per byte at each number of passes, by the rule that generation follows; of routed depth, tokens
    that would go on stop there. JSON.

    Raises RecipeError as `check_depths`.
    """
    check_depths(subject.recipe, depths)
    depths, trained = sorted(set(depths)), _trained(subject.recipe)
    grid: list[list[Measured]] = []
    for passes in depths:
        taken = None if passes == trained else passes  # a program that there is
        say(f"{passes} pass{'es' * (passes > 1)}")
        grid.append(
            [measure(subject, data, subject.rule, passes=taken, most=most, resamples=resamples) for data in sets]
        )
    names = [data.name for data in sets]
    points = [
        {"passes": passes, **macro(row), "per_set": dict(zip(names, map(_point, row), strict=True))}
        for passes, row in zip(depths, grid, strict=True)
    ]
    columns = dict(zip(names, zip(*grid, strict=True), strict=True))
    return {
        "rule": subject.rule,
        "trained": trained,
        "points": points,
        "per_set": {name: _verdict(depths, [[one] for one in column]) for name, column in columns.items()},
        **_verdict(depths, grid),
    }


def _verdict(depths: Sequence[int], grid: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """That of the unweighted mean over the sets of a row; a row for each depth."""
    losses = [float(np.mean([one.told["loss"] for one in row])) for row in grid]
    drawn = [[one.resamples.loss for one in row if one.resamples is not None] for row in grid]
    known = all(len(some) == len(row) for some, row in zip(drawn, grid, strict=True))
    return verdict(depths, losses, np.array([np.mean(row, axis=0) for row in drawn]) if known else None)


def _point(one: Measured) -> dict[str, Any]:
    names = ("loss", "loss_interval", "bits_per_byte", "bits_per_byte_interval", "compute")
    return {name: one.told[name] for name in names}


def _trained(recipe: Recipe) -> int:
    body = recursion_of(recipe.model)
    assert body is not None
    return body.recursions


def verdict(depths: Sequence[int], losses: Sequence[float], drawn: np.ndarray | None = None) -> dict[str, Any]:
    """What a curve says, in a word and a sentence.

    losses  nats per token at each of the depths, which ascend
    drawn   f64[depths, resamples] the same of resamples; None: only `SAME` tells a difference from none

    falling  the deepest is better than the shallowest, and nothing is better than the deepest
    rising   the deepest is worse than the shallowest, and nothing is better than the shallowest
    U        some depth in between is better than both ends
    flat     anything else: no end is better than the other, and none in between better than both
    A depth is better than another if its loss is lower by more than `SAME` and, where resamples are given, in their
    95 % interval as well.
    """
    if len(depths) < 2:
        return {"verdict": "one depth", "says": "one depth is no curve: give at least two"}
    if not np.isfinite(losses).all():
        return {"verdict": "not finite", "says": "some of the losses are not finite"}

    def better(i: int, j: int) -> bool:
        if losses[j] - losses[i] <= SAME:
            return False
        found = None if drawn is None else interval(drawn[j] - drawn[i])
        return found is None or found[0] > 0

    best, last = int(np.argmin(losses)), len(depths) - 1
    enough = next(i for i in range(len(depths)) if not better(best, i))
    gain = losses[0] - losses[last]
    if better(best, 0) and better(best, last):
        return {
            "verdict": "U",
            "says": f"U: best at {depths[best]}; at {depths[last]} it is {losses[last] - losses[best]:.4f} nats worse",
        }
    if better(last, 0):
        flat = f", flat from {depths[enough]} on" if enough < last else ""
        return {"verdict": "falling", "says": f"falling by {gain:.4f} nats from {depths[0]} to {depths[last]}{flat}"}
    if better(0, last):
        return {"verdict": "rising", "says": f"rising by {-gain:.4f} nats from {depths[0]} to {depths[last]}"}
    return {"verdict": "flat", "says": "flat: no depth is better than another by more than chance and 0.002 nats"}
