"""Gathering rows of a sequence and putting them back, batch by batch.

Indices are unique within a sequence and in bounds, which `Selection` guarantees; saying so lets XLA write in parallel.
Written as a vmap over the batch, so that a sharded batch needs no communication.
"""

import functools
from typing import Any

import jax

from adaptive.routing.types import Selection

PROMISE: dict[str, Any] = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}


@jax.vmap
def take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [batch, seq, ...], indices i32[batch, n] -> x at those positions [batch, n, ...]."""
    return x.at[indices].get(**PROMISE)


@jax.vmap
def add_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with rows [batch, n, ...] added at indices i32[batch, n]; other positions bit-identical."""
    return x.at[indices].add(rows, **PROMISE)


@jax.vmap
def set_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with the positions indices i32[batch, n] replaced by rows [batch, n, ...]."""
    return x.at[indices].set(rows, **PROMISE)


def membership(selection: Selection, seq_len: int) -> jax.Array:
    """bool[batch, seq_len]: the positions that `selection` holds."""
    mark = functools.partial(jax.numpy.zeros, seq_len, bool)
    return jax.vmap(lambda i, valid: mark().at[i].set(valid, **PROMISE))(selection.indices, selection.valid)
