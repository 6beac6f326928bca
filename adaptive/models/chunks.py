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
    apply: Callable[[Any, Where, State], tuple[Any, State, Any]],
    x: Any,
    where: Where,
    state: State,
    rows: int,
) -> tuple[Any, State, Any]:
    """As `apply(x, where, state)` on all rows, but in groups of `rows` of those that exist, until none is left.

    x        a tree of arrays [batch, 1, ...], at `where`, which says which rows exist
    returns  (output like x, state, told), `told` being a tree of arrays with rows first; of rows that do not exist
             output and told are zero and the state is as it was
    """
    assert where.exists is not None
    batch = where.shape[0]
    rows = min(rows, batch)
    everyone = rows == batch
    _, _, told = jax.eval_shape(apply, x, where, state)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (x, told))

    def group(carry: Any) -> Any:
        pending, state, made = carry

        def of_rows(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        if everyone:  # nothing to pick out, and rows that do not exist stay as they are
            y, state, told = apply(x, where, state)
            live = lambda new, old: of_rows(pending, new.astype(old.dtype), old)  # noqa: E731
            return jnp.zeros_like(pending), state, jax.tree.map(live, (y, told), made)
        order = jnp.argsort(~pending, stable=True)[:rows]  # after the pending ones others, which stay
        there = pending[order]
        at = lambda a: a[order]  # noqa: E731
        own = jax.tree.map(at, where).replace(exists=there[:, None])
        y, after, told = apply(jax.tree.map(at, x), own, take(state, order))

        def put_rows(new: jax.Array, old: jax.Array) -> jax.Array:
            return old.at[order].set(of_rows(there, new.astype(old.dtype), old[order]), unique_indices=True)

        return pending.at[order].set(False), put(state, order, after), jax.tree.map(put_rows, (y, told), made)

    _, state, (y, told) = jax.lax.while_loop(lambda carry: carry[0].any(), group, (where.exists[:, 0], state, zeros))
    return y, state, told
