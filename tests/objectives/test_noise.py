"""Which tokens are hidden and what they count: shares, numbers, blocks, complements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.layers.reach import blocks_of
from adaptive.objectives.noise import Units, by_chance, by_number, complement, ratios, whole_rows

pytestmark = pytest.mark.compiles

KEYS = jax.random.split(jax.random.key(0), 512)
ROWS, SEQ = 2, 12


@pytest.fixture(scope="module")
def case():
    """(counted, units of the rows, units of blocks of 4): a document of 7 tokens and one of 5, of which 3 padding."""
    counted = np.ones((ROWS, SEQ), bool)
    counted[0, 9:] = counted[1, 2] = False
    number = np.array([[*range(7), *range(5)]] * ROWS, np.int32)
    return counted, whole_rows((ROWS, SEQ)), Units(*blocks_of(number, 4))


def test_blocks_are_counted_from_where_a_document_begins(case):
    first, end = case[2]
    assert first[0].tolist() == [0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 7, 11]
    assert end[0].tolist() == [4, 4, 4, 4, 7, 7, 7, 11, 11, 11, 11, 12]


@pytest.mark.parametrize("draws", ["independent", "stratified", "antithetic"])
def test_every_share_is_uniform(draws):
    of = np.asarray(jax.jit(jax.vmap(lambda key: ratios(key, 8, draws)))(KEYS))
    assert ((of >= 0) & (of <= 1)).all()
    np.testing.assert_allclose(of.mean(0), 0.5, atol=0.05)
    np.testing.assert_allclose(of.std(0), 12**-0.5, atol=0.03)
    if draws == "stratified":
        np.testing.assert_array_equal(np.sort((of * 8).astype(int)), np.broadcast_to(np.arange(8), of.shape))
        halves = np.sort((of[:, :4] * 4).astype(int))  # half of the rows, such as those of a device, are spread as well
        np.testing.assert_array_equal(halves, np.broadcast_to(np.arange(4), halves.shape))
    if draws == "antithetic":
        np.testing.assert_allclose(of[:, ::2] + of[:, 1::2], 1, rtol=1e-6)
        assert (np.sort((of[:, ::2] * 4).astype(int)) == np.arange(4)).all()


@pytest.mark.parametrize("unit", ["rows", "blocks"])
def test_exact_weights_are_one_over_the_hidden_share(case, unit):
    counted, rows, blocks = case
    units = rows if unit == "rows" else blocks
    t = jnp.full((ROWS, SEQ), 0.3)
    of = jax.jit(jax.vmap(lambda key: by_chance(key, t, counted, units, "exact", 1e-3, stable=False)))(KEYS)
    hidden, weights = np.asarray(of.hidden), np.asarray(of.weights)
    assert not hidden[:, ~counted].any()
    for row in range(ROWS):
        for first in np.unique(units.first[row]):
            inside = (np.asarray(units.first[row]) == first) & counted[row]
            if not inside.any():
                continue
            some = hidden[:, row, inside].sum(1)
            assert some.min() == 1  # at least one, also where chance hides none
            # All of them are hidden alike, and each unit counts as many as it has.
            np.testing.assert_allclose(hidden[:, row, inside].mean(0), some.mean() / inside.sum(), atol=0.09)
            np.testing.assert_allclose(weights[:, row, inside].sum(1), inside.sum(), rtol=1e-6)


@pytest.mark.parametrize("weighting", ["llada", "mdlm"])
def test_weights_are_one_over_the_probability(case, weighting):
    counted, rows, _ = case
    t, eps = 0.4, 0.1
    of = jax.jit(
        jax.vmap(lambda k: by_chance(k, jnp.full((ROWS, SEQ), t), counted, rows, weighting, eps, stable=False))
    )
    hidden, weights = map(np.asarray, of(KEYS))
    within = (1 - eps) * t + eps
    chance, weight = (within, 1 / within) if weighting == "llada" else (0.999 * within, 1 / within)
    np.testing.assert_allclose(hidden[:, counted].mean(), chance, atol=0.02)
    np.testing.assert_allclose(weights[hidden], weight, rtol=1e-5)
    assert not weights[~hidden].any()


def test_the_bound_hides_a_number_that_is_uniform(case):
    counted, rows, _ = case
    t = jnp.arange(512)[:, None, None] / 512 * jnp.ones((1, ROWS, SEQ))
    hidden, weights = map(np.asarray, jax.jit(jax.vmap(lambda k, t: by_number(k, t, counted, rows)))(KEYS, t))
    for row in range(ROWS):
        n = counted[row].sum()
        np.testing.assert_array_equal(hidden[:, row].sum(-1), 1 + np.arange(512) * n // 512)
        np.testing.assert_allclose(weights[:, row].sum(-1), n, rtol=1e-6)


def test_a_complement_hides_what_was_not(case):
    counted, rows, _ = case
    one = by_chance(KEYS[0], jnp.full((ROWS, SEQ), 0.5), counted, rows, "exact", 1e-3, stable=False)
    other = complement(one, counted, rows, stable=False)
    np.testing.assert_array_equal(np.asarray(one.hidden) ^ np.asarray(other.hidden), counted)
    np.testing.assert_allclose(other.weights.sum(-1), counted.sum(-1), rtol=1e-6)
    whole = complement(one._replace(hidden=jnp.asarray(counted)), counted, rows, stable=False)
    assert not whole.weights.any()
