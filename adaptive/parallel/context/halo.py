"""The last positions of earlier shards, where those of this one need them."""

import jax
import jax.numpy as jnp

from adaptive.parallel.context.layout import moved


def extended(x: jax.Array, axis: str, parts: int, reach: int, first: jax.Array | None = None) -> jax.Array:
    """[batch, n, ...] of each device -> [batch, reach + n, ...]: behind the `reach` positions that precede them.

    As many permutations as shards are reached, each of what is needed alone. Before the row's first position there is
    `first` [batch, reach, ...], of which the last positions count; None: zeros.
    """
    length = x.shape[1]
    pieces, left, hops = [x], reach, 1
    while left > 0 and hops < parts:
        size = min(left, length)
        pairs = [(i, i + hops) for i in range(parts - hops)]
        pieces.insert(0, moved(x[:, length - size :], axis, pairs))
        left, hops = left - size, hops + 1
    if left > 0:
        pieces.insert(0, jnp.zeros((x.shape[0], left, *x.shape[2:]), x.dtype))
    out = jnp.concatenate(pieces, axis=1)
    if first is None:
        return out
    missing = reach - jax.lax.axis_index(axis) * length  # positions before the row that this device sees
    place = jnp.arange(reach + length, dtype=jnp.int32).reshape(1, -1, *(1,) * (x.ndim - 2))
    shifted = jnp.pad(first, ((0, 0), (0, length), *((0, 0),) * (x.ndim - 2)))
    back = reach - jnp.maximum(missing, 0)
    return jnp.where(place < missing, jnp.roll(shifted, -back, axis=1), out)
