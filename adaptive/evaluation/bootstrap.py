"""Intervals by bootstrap: what other samples of the same documents would have given."""

from typing import NamedTuple

import numpy as np

from adaptive.evaluation.predictions import Sums

RESAMPLES = 1000
FEWEST = 5  # documents; with fewer, rows are resampled
LEVEL = 0.95
_AT_ONCE = 10_000_000  # numbers of resampled counts that exist at once


class Resampled(NamedTuple):
    """f64[resamples] each: the statistics of every resample. Those of one set are paired: resample i has the same
    documents, whatever the model did."""

    loss: np.ndarray
    bits_per_byte: np.ndarray


def resampled(sums: Sums, seed: int, resamples: int = RESAMPLES) -> Resampled | None:
    """Units drawn with replacement, as many as there are; None where there are fewer than two."""
    units = len(sums.nats)
    if units < 2:
        return None
    rng = np.random.default_rng([seed, units])
    step = max(1, _AT_ONCE // units)
    drawn = []
    for first in range(0, resamples, step):
        weights = rng.multinomial(units, np.full(units, 1 / units), size=min(step, resamples - first))
        drawn.append([weights @ one for one in sums])
    whole = Sums(*(np.concatenate(parts)[:, None] for parts in zip(*drawn, strict=True)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Resampled(whole.loss(), whole.bits_per_byte())


def interval(values: np.ndarray | None) -> list[float] | None:
    """The middle 95 % of the values; None where there are none, or some are not finite."""
    if values is None or not np.isfinite(values).all():
        return None
    edge = 100 * (1 - LEVEL) / 2
    return [float(x) for x in np.percentile(values, [edge, 100 - edge])]


def means(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray | None:
    """f64[resamples]: the mean of f64[n], such as whether each item was right, in every resample; None of fewer than
    two."""
    n = len(values)
    if n < 2:
        return None
    rng = np.random.default_rng([seed, n])
    step = max(1, _AT_ONCE // n)
    drawn = [
        values[rng.integers(0, n, size=(min(step, resamples - first), n))].mean(axis=1)
        for first in range(0, resamples, step)
    ]
    return np.concatenate(drawn)
