"""Radix selection against a stable sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import selection

pytestmark = pytest.mark.compiles


def scores(kind: str, rows: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    drawn = rng.normal(size=(rows, n)).astype(np.float32)
    match kind:
        case "ties":
            return np.round(drawn, 1)
        case "equal":
            return np.zeros_like(drawn)
        case "special":
            some = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1.0], np.float32)
            return rng.choice(some, size=drawn.shape)
    return drawn


def by_sorting(values: np.ndarray, count: int) -> np.ndarray:
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


@pytest.mark.parametrize("kind", ["drawn", "ties", "equal", "special"])
@pytest.mark.parametrize("n", [1, 7, 200])
def test_mask_and_positions(kind, n):
    values = scores(kind, 3, n)
    masks = jax.jit(selection.top_mask)
    for count in {0, 1, n // 3, n - 1, n}:
        mask = np.asarray(masks(values, count))
        np.testing.assert_array_equal(mask, by_sorting(values, count))
    count = max(1, n // 3)
    mask = by_sorting(values, count)
    want = np.nonzero(mask)[1].reshape(3, count)
    np.testing.assert_array_equal(selection.positions(jnp.asarray(mask), count), want)
    by_sorting_once = selection._by_sorting(count)(jnp.asarray(mask), jnp.cumsum(mask, -1))
    np.testing.assert_array_equal(by_sorting_once, want)
    np.testing.assert_array_equal(selection.top_positions(jnp.asarray(values), count), want)


def test_counts_by_row():
    values = scores("ties", 4, 50)
    counts = np.array([[0], [3], [50], [70]], np.int32)
    got = np.asarray(selection.top_mask(jnp.asarray(values), counts))
    for row, count in enumerate(counts[:, 0]):
        np.testing.assert_array_equal(got[row], by_sorting(values[row : row + 1], count)[0])


def test_a_mask_that_breaks_its_promise_is_found(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CHECKS", "1")
    with pytest.raises(ValueError, match="the 2 positions"):
        selection.positions(jnp.array([[True, False, False]]), 2)
