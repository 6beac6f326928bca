"""Fits find the truth of losses that were made by a law, and their intervals hold it."""

import numpy as np
import pytest

from adaptive.sweeps import fits
from adaptive.sweeps.fits import fit
from adaptive.sweeps.laws import Chinchilla, Curves, WorthOfRecursion, middle

PHI = 0.46


def grid() -> tuple[np.ndarray, ...]:
    """(once, shared, passes, tokens) of a ladder: four sizes, one to four passes, three amounts of data."""
    rows = [
        (40.0 * width**2, 130.0 * width**2 / passes, passes, 3e4 * width * amount)
        for width in (16, 24, 32, 48)
        for passes in (1, 2, 3, 4)
        for amount in (0.5, 1.0, 2.0)
    ]
    return tuple(np.array(rows, np.float64).T)


def made(phi: float, noise: float = 0.0, seed: int = 0) -> tuple[WorthOfRecursion, np.ndarray, list[str]]:
    once, shared, passes, tokens = grid()
    n = once + passes**phi * shared
    loss = 0.7 + 30 * n**-0.35 + 45 * tokens**-0.3
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return WorthOfRecursion(once, shared, passes, tokens), loss, [f"{r:g}" for r in passes]


@pytest.mark.parametrize("phi", [-0.5, 0.0, PHI, 1.0, 1.4])
def test_the_worth_of_a_recursion_is_found(phi):
    law, loss, groups = made(phi)
    one = fit(law, loss, groups, resamples=2)
    assert one["phi"] == pytest.approx(phi, abs=1e-3)
    assert (one["alpha"], one["beta"], one["E"]) == pytest.approx((0.35, 0.3, 0.7), abs=2e-3)
    assert one.r_squared > 0.999999 and not one.at_limit("phi") and one.runs == 48


def test_coefficients_are_nats_at_the_middle():
    once, shared, _, tokens = grid()
    n = once + shared
    one = fit(Chinchilla(n, tokens), 0.7 + 30 * n**-0.35 + 45 * tokens**-0.3, resamples=2)
    assert one["A"] == pytest.approx(30 * middle(n) ** -0.35, rel=1e-3)
    assert one["B"] == pytest.approx(45 * middle(tokens) ** -0.3, rel=1e-3)


def test_curves_of_variants_are_shifts_of_compute():
    compute = np.tile(np.geomspace(1e11, 1e13, 5), 3)
    names = [name for name in ("vanilla", "worse", "better") for _ in range(5)]
    worth = np.repeat([1.0, 0.5, 4.0], 5)
    one = fit(Curves(names, compute), 1.1 + 300 * (worth * compute) ** -0.22, names, resamples=2)
    assert one["alpha"] == pytest.approx(0.22, abs=1e-3) and one["E"] == pytest.approx(1.1, abs=1e-2)
    times = [(one["vanilla"] / one[name]) ** (1 / one["alpha"]) for name in ("worse", "better")]
    assert times == pytest.approx([0.5, 4.0], rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(12):
        law, loss, groups = made(PHI, noise=0.003, seed=seed)
        low, high = fit(law, loss, groups, resamples=40).interval("phi")
        held += low <= PHI <= high
        assert 0 < high - low < 0.3
    assert held >= 10  # of a binomial with 0.95; below once in 50 times


def test_an_interval_is_wide_where_the_runs_say_little():
    once, shared, passes, tokens = grid()
    some = np.flatnonzero(passes <= 2)
    loss = made(PHI, noise=0.05)[1][some]
    law = WorthOfRecursion(once[some], shared[some], passes[some], tokens[some])
    one = fit(law, loss, [f"{p}" for p in passes[some]], resamples=60)
    low, high = one.interval("phi")
    assert high - low > 1 or one.at_limit("phi")


def test_one_run_that_went_wrong_counts_little():
    law, loss, groups = made(PHI)
    loss[7] *= 1.3
    robust, squares = (fit(law, loss, groups, resamples=2, huber=huber)["phi"] for huber in (5e-3, 1e3))
    assert abs(robust - PHI) < 0.02 < abs(squares - PHI)


def test_coefficients_are_never_negative():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    x = rng.random((40, 12, 3))
    y = np.einsum("bnk,k->bn", x, [1.0, -0.4, 0.6]) + 0.1 * rng.standard_normal((40, 12))
    found = fits.nonnegative(np.swapaxes(x, 1, 2) @ x, np.einsum("bnk,bn->bk", x, y))
    expected = [optimize.nnls(a, b)[0] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert (found[:, 1] == 0).sum() > 20


def test_resamples_keep_every_group():
    drawn = fits.weights(["a", "a", "a", "b", "b"], 50, 0)
    assert (drawn[:, :3].sum(1) == 3).all() and (drawn[:, 3:].sum(1) == 2).all() and len(np.unique(drawn, axis=0)) > 9
