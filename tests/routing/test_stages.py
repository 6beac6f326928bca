"""Decisions of nested stages at the bytes they belong to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.routing.boundaries import Boundaries, select_boundaries
from adaptive.routing.stages import at_bytes
from adaptive.routing.types import StageTrace

pytestmark = pytest.mark.compiles

OUTER = np.array([[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]], bool)
EXISTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
PROB = np.linspace(0.1, 0.9, 12).reshape(2, 6)


@functools.partial(jax.jit, static_argnums=3)
def stage(mask, prob, exists, capacity):
    found = Boundaries(jnp.asarray(prob, jnp.float32), jnp.asarray(mask & exists))
    selection, kept = select_boundaries(found, capacity)
    return StageTrace(found.prob, kept, found.wanted & ~kept, jnp.asarray(exists), selection)


@pytest.mark.parametrize("packed", [False, True])
def test_inner_boundaries_are_found_at_the_bytes_that_their_chunks_begin_with(packed):
    join = (lambda a: a.reshape(1, -1)) if packed else (lambda a: a)
    outer = stage(join(OUTER), join(PROB), join(EXISTS), 10 if packed else 5)
    slots = outer.selection.valid.shape
    inner_mask = np.zeros(slots, bool)
    inner_mask[0, [0, 2]] = True  # the first and the third chunk of the first row
    inner = stage(inner_mask, np.full(slots, 0.25), np.asarray(outer.selection.valid), 3)
    first, second = jax.jit(at_bytes, static_argnums=1)((outer, inner), (2, 6))
    assert (np.asarray(first.mask) == (OUTER & EXISTS)).all()
    assert np.allclose(np.where(EXISTS, first.prob, 0), np.where(EXISTS, PROB, 0))
    assert np.isnan(np.asarray(first.prob)[1, 5]), "padding decides nothing"
    assert np.argwhere(np.asarray(second.mask)).tolist() == [[0, 0], [0, 3]]
    assert (np.isfinite(np.asarray(second.prob)) == (OUTER & EXISTS)).all()
    assert at_bytes((), (2, 6)) == ()
