"""Which chunks reach the network inside an H-Net, where they stand, and computing them for some rows alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.layers.state import State, put, take
from adaptive.layers.where import Where
from adaptive.parallel.rules import batch_shards, constrain
from adaptive.routing.boundaries import gather
from adaptive.routing.chunks import begins
from adaptive.routing.types import Selection


def shifted(x: jax.Array, last: jax.Array | None) -> jax.Array:
    """[batch, n, ...]: each position holds the one before it, the first of all `last` (None: zeros)."""
    first = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def after_chunks(selection: Selection, segments: jax.Array | None, seen: jax.Array | None) -> Where:
    """Where chunks stand among the chunks of their documents, after `seen` i32[batch] earlier ones."""
    valid = selection.valid
    if segments is not None:
        own = jnp.where(valid, gather(segments, selection.indices), 0)
        return Where.whole((valid.shape[0], valid.shape[1]), None, own, valid)
    zeros = jnp.zeros(len(valid), jnp.int32)
    return Where.after(zeros if seen is None else seen, valid.shape[1], valid)


def packed(found: Any, exists: jax.Array, segments: jax.Array | None, h: jax.Array) -> tuple[Any, ...]:
    """All rows of a device as one, their documents told apart: capacities are shared, so less room is needed."""
    shards, (rows, n) = batch_shards(), exists.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None] % (rows // shards)
    own = jnp.ones_like(exists, jnp.int32) if segments is None else jnp.cumsum(begins(segments), axis=1)
    segments = jnp.where(exists, own + row * (n + 1), 0)  # 0 remains padding
    join = lambda a: constrain(a.reshape(shards, -1, *a.shape[2:]), "batch", "seq", *(None,) * (a.ndim - 2))  # noqa: E731
    return jax.tree.map(join, found), join(exists), join(segments), join(h)


def in_groups(
    apply: Callable[[jax.Array, Where, State], tuple[jax.Array, State, Any]],
    x: jax.Array,
    where: Where,
    state: State,
    rows: int,
) -> tuple[jax.Array, State, Any]:
    """As `apply(x, where, state)` on all rows, but in groups of `rows` of those that exist, until none is left.

    x        [batch, 1, width], at `where`, which says which rows exist
    returns  (output [batch, 1, width], state, told), `told` being a pytree of arrays with rows first; of rows that do
             not exist output and told are zero and the state is as it was
    """
    assert where.exists is not None
    rows = min(rows, len(x))
    everyone = rows == len(x)
    _, _, told = jax.eval_shape(apply, x, where, state)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), told)

    def group(carry: Any) -> Any:
        pending, y, state, told = carry
        if everyone:  # nothing to pick out, and rows that do not exist stay as they are
            y, state, told = apply(x, where, state)
            live = lambda a: jnp.where(pending.reshape(-1, *(1,) * (a.ndim - 1)), a, jnp.zeros_like(a))  # noqa: E731
            return jnp.zeros_like(pending), live(y), state, jax.tree.map(live, told)
        order = jnp.argsort(~pending, stable=True)[:rows]  # after the pending ones others, which stay
        there = pending[order]
        own = Where(where.number[order], where.index[order], None, there[:, None])
        new_y, new_state, new_told = apply(x[order], own, take(state, order))

        def put_rows(old: jax.Array, new: jax.Array) -> jax.Array:
            kept = jnp.where(there.reshape(-1, *(1,) * (new.ndim - 1)), new, old[order])
            return old.at[order].set(kept, unique_indices=True)

        state = put(state, order, new_state)
        return pending.at[order].set(False), put_rows(y, new_y), state, jax.tree.map(put_rows, told, new_told)

    start = where.exists[:, 0], jnp.zeros(x.shape, x.dtype), state, zeros
    _, y, state, told = jax.lax.while_loop(lambda carry: carry[0].any(), group, start)
    return y, state, told
