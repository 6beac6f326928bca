"""Positions that are taken out of rows keep where they stood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.layers.rope import Rotary
from adaptive.layers.where import Where

pytestmark = pytest.mark.compiles

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0]], jnp.int32)
INDICES = jnp.array([[1, 3, 5], [0, 2, 4]], jnp.int32)


def test_taken_positions_keep_place_document_and_tables():
    where = Where.whole((2, 6), None, SEGMENTS).with_tables(Rotary(4, 100.0))
    few = where.take(INDICES, None)
    assert few.number.tolist() == [[1, 0, 2], [0, 0, 2]]
    assert few.index.tolist() == INDICES.tolist()
    assert few.segments.tolist() == [[1, 2, 2], [1, 2, 2]]
    fresh = Where(few.number, few.index).rope(Rotary(4, 100.0))
    for a, b in zip(jax.tree.leaves(few.rope(Rotary(4, 100.0))), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_padding_exists_nowhere_and_counts_are_of_what_exists():
    where = Where.whole((2, 6), None, SEGMENTS)
    assert where.present().tolist() == (SEGMENTS > 0).tolist()
    assert where.only(SEGMENTS > 1).counts().tolist() == [3, 3]
    assert where.only(SEGMENTS > 1).documents().segments.tolist() == [[0, 0, 0, 2, 2, 2], [0, 0, 2, 2, 2, 0]]
    assert Where.after(jnp.array([3, 0]), 2).index.tolist() == [[3, 4], [0, 1]]
