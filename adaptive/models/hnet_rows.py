"""Decoding one byte per row: the network inside computes only the rows where a chunk begins, a few at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.layers.stack import Places


def in_groups(
    apply: Callable[[jax.Array, Places, Any], tuple[jax.Array, Any, Any]],
    x: jax.Array,
    places: Places,
    cache: Any,
    axes: Any,
    rows: int,
) -> tuple[jax.Array, Any, Any]:
    """As `apply(x, places, cache)` on all rows, but in groups of `rows` of those that exist, until none is left.

    x        [batch, 1, width], at `places`, whose `valid` says which rows exist
    cache    pytree; axes: the same tree with the number of the axis of rows in the place of every array
    returns  (output [batch, 1, width], cache, told), `told` being a pytree of arrays with rows first; of rows that do
             not exist output and told are zero and the cache is as it was
    """
    assert places.valid is not None and places.seen is not None
    rows, seen = min(rows, len(x)), places.seen
    everyone = rows == len(x)
    _, _, told = jax.eval_shape(apply, x, places, cache)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told)

    def group(carry: Any) -> Any:
        pending, y, cache, told = carry
        if everyone:  # nothing to pick out, and rows that do not exist stay as they are
            y, cache, told = apply(x, places, cache)
            live = lambda a: jnp.where(pending.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.zeros_like(a))  # noqa: E731
            return jnp.zeros_like(pending), live(y), cache, jax.tree.map(live, told)
        order = jnp.argsort(~pending, stable=True)[:rows]  # after the pending ones others, which stay
        own = Places(places.number[order], None, pending[order][:, None], seen[order])
        few = jax.tree.map(lambda a, axis: jnp.take(a, order, axis), cache, axes)
        new_y, new_cache, new_told = apply(x[order], own, few)
        there = pending[order]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            kept = jnp.where(there.reshape(-1, *(1,) * (new.ndim - 1)), new, old[order])
            return old.at[order].set(kept, unique_indices=True)

        cache = jax.tree.map(lambda a, b, axis: _set(a, order, b, axis), cache, new_cache, axes)
        return pending.at[order].set(False), put(y, new_y), cache, jax.tree.map(put, told, new_told)

    start = places.valid[:, 0], jnp.zeros(x.shape, x.dtype), cache, zeros
    _, y, cache, told = jax.lax.while_loop(lambda carry: carry[0].any(), group, start)
    return y, cache, told


def _set(a: jax.Array, rows: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    where = (slice(None),) * axis + (rows,)
    return a.at[where].set(new.astype(a.dtype), unique_indices=True)
