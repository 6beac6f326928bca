"""Radix selection against a stable sort in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas import selection

pytestmark = pytest.mark.compiles


def by_sorting(values: np.ndarray, count: int) -> np.ndarray:
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


LENGTHS = {1: 1, 7: 3, 200: 66}  # of a row, and how many of it are taken where programs are compiled for a number
NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])


@st.composite
def rows(draw):
    """f32[3, n]: numbers of any kind, few of them different in half of the rows."""
    n = draw(st.sampled_from(list(LENGTHS)))
    some = draw(st.lists(NUMBERS, min_size=1, max_size=3 * n))
    rng = np.random.default_rng(draw(st.integers(0)))
    return np.asarray(some, np.float32)[rng.integers(0, len(some), (3, n))]


masks = jax.jit(selection.top_mask)


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(values=rows(), share=st.floats(0, 1))
def test_mask_and_positions_of_any_numbers(values, share):
    n = values.shape[1]
    for count in {0, round(share * n), n}:
        np.testing.assert_array_equal(masks(values, count), by_sorting(values, count))
    count = LENGTHS[n]
    mask = by_sorting(values, count)
    want = np.nonzero(mask)[1].reshape(3, count)
    np.testing.assert_array_equal(selection.positions(jnp.asarray(mask), count), want)
    by_sorting_once = selection._by_sorting(count)(jnp.asarray(mask), jnp.cumsum(mask, -1))
    np.testing.assert_array_equal(by_sorting_once, want)
    np.testing.assert_array_equal(selection.top_positions(jnp.asarray(values), count), want)


def test_counts_by_row():
    values = np.random.default_rng(50).normal(size=(4, 50)).astype(np.float32).round(1)
    counts = np.array([[0], [3], [50], [70]], np.int32)
    got = np.asarray(selection.top_mask(jnp.asarray(values), counts))
    for row, count in enumerate(counts[:, 0]):
        np.testing.assert_array_equal(got[row], by_sorting(values[row : row + 1], count)[0])


def test_a_mask_that_breaks_its_promise_is_found(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CHECKS", "1")
    with pytest.raises(ValueError, match="the 2 positions"):
        selection.positions(jnp.array([[True, False, False]]), 2)
