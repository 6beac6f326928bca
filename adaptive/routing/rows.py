"""Gathering rows of a sequence and putting them back, batch by batch.

Indices are unique within a sequence and in bounds, which `Selection` guarantees; saying so lets XLA write in parallel.
Written as a vmap over the batch, so that a sharded batch needs no communication.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.routing.types import Selection

_PROMISE: dict[str, Any] = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}


@jax.vmap
def take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [batch, seq, ...], indices i32[batch, n] -> x at those positions [batch, n, ...]."""
    return x.at[indices].get(**_PROMISE)


@jax.vmap
def add_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with rows [batch, n, ...] added at indices i32[batch, n]; other positions bit-identical."""
    return x.at[indices].add(rows, **_PROMISE)


@jax.vmap
def set_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with the positions indices i32[batch, n] replaced by rows [batch, n, ...]."""
    return x.at[indices].set(rows, **_PROMISE)


def take_rows_within(layer: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    """As `take_rows` of x[layer], x [layers, batch, seq, ...]."""
    return x.at[layer, jnp.arange(x.shape[1])[:, None], indices].get(**_PROMISE)


def set_rows_within(layer: jax.Array, x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """As `set_rows` of x[layer], x [layers, batch, seq, ...], with the other layers as they are."""
    return x.at[layer, jnp.arange(x.shape[1])[:, None], indices].set(rows, **_PROMISE)


def membership(selection: Selection, seq_len: int) -> jax.Array:
    """bool[batch, seq_len]: the positions that `selection` holds."""
    mark = functools.partial(jax.numpy.zeros, seq_len, bool)
    return jax.vmap(lambda i, valid: mark().at[i].set(valid, **_PROMISE))(selection.indices, selection.valid)
