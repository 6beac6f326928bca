"""Runs of a study that nobody trained: losses follow a law that is known."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from adaptive.account import parameters
from adaptive.sweeps.runs import Outcome, Planned

TRUTH = {"E": 0.9, "A": 0.8, "alpha": 0.35, "B": 0.6, "beta": 0.3}
START = {
    "time": "2026-11-30T10:00:00+00:00", "devices": "1 x cpu", "processor": "a processor", "cores": 2, "jax": "0.10.2",
    "package": {"commit": "0123456789", "changed": True},
}  # fmt: skip


def losses(runs: Sequence[Planned], phi: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """By the law of arXiv 2604.21106, written out anew, with relative noise."""
    rng = np.random.default_rng(seed)
    out = []
    for run in runs:
        n = (run.labels["once"] + run.labels["passes"] ** phi * run.labels["shared"]) / 50_000
        loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * (run.tokens / 1e6) ** -TRUTH["beta"]
        out.append(loss * float(np.exp(noise * rng.standard_normal())))
    return out


def outcome(run: Planned, loss: float, *, rules: Sequence[str] = ("causal",)) -> Outcome:
    drawn = loss * (1 + 0.01 * np.random.default_rng(1).standard_normal(1000))  # paired: of all runs alike
    return Outcome(
        name=run.name,
        labels=run.labels,
        tokens=run.tokens,
        flops=run.flops,
        parameters=dataclasses.asdict(parameters(run.recipe.model)),
        seconds=30.0,
        rule=rules[-1],
        told={rule: {"loss": loss} for rule in rules},
        drawn=dict.fromkeys(rules, drawn),
        start=START,
    )


def outcomes(
    runs: Sequence[Planned], phi: float, noise: float = 0.0, change: Callable[[Planned], float] = lambda run: 1.0
) -> list[Outcome]:
    """change: of a run's loss, a factor."""
    return [outcome(run, loss * change(run)) for run, loss in zip(runs, losses(runs, phi, noise), strict=True)]
