"""Which positions reach a stage of an H-Net, and where they stand in their documents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.layers.stack import Places
from adaptive.parallel.rules import batch_shards, constrain
from adaptive.routing.boundaries import gather
from adaptive.routing.chunks import begins, numbered


class Level(NamedTuple):
    """The positions [batch, n] that reach a stage.

    places   where they stand, for attention and Mamba-2
    tokens, given  i32[batch, n], bool[batch, n]: the bytes, and boundaries that came with the batch; stage 0 alone
    """

    places: Places
    tokens: jax.Array | None = None
    given: jax.Array | None = None


def shifted(x: jax.Array, last: jax.Array | None) -> jax.Array:
    """[batch, n, ...]: each position holds the one before it, the first of all `last` (None: zeros)."""
    first = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def inner_places(
    valid: jax.Array, segments: jax.Array | None, indices: jax.Array, seen: jax.Array | None
) -> Places:  # fmt: skip
    """Where chunks stand among the chunks of their documents."""
    if segments is not None:
        own = jnp.where(valid, gather(segments, indices), 0)
        return Places(numbered(valid.shape, own), own, valid)
    number = numbered(valid.shape, None)
    return Places(number if seen is None else number + seen[:, None], None, valid, seen)


def packed(found: Any, exists: jax.Array, segments: jax.Array | None, h: jax.Array) -> tuple[Any, ...]:
    """All rows of a device as one, their documents told apart: capacities are shared, so less room is needed."""
    shards, (rows, n) = batch_shards(), exists.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None] % (rows // shards)
    own = jnp.ones_like(exists, jnp.int32) if segments is None else jnp.cumsum(begins(segments), axis=1)
    segments = jnp.where(exists, own + row * (n + 1), 0)  # 0 remains padding
    join = lambda a: constrain(a.reshape(shards, -1, *a.shape[2:]), "batch", "seq", *(None,) * (a.ndim - 2))  # noqa: E731
    return jax.tree.map(join, found), join(exists), join(segments), join(h)
