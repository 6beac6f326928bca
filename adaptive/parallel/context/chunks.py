"""Chunks of sequences that are split over the context axis: sums and averages run on from part to part, and every
position finds its chunk, though it may begin in an earlier part."""

import jax
import jax.numpy as jnp

from adaptive.parallel.rows import ROW, SLOT, added, communicator_of_rows
from adaptive.parallel.rules import along, seq_shards
from adaptive.parallel.shard import sharded
from adaptive.routing import boundaries
from adaptive.routing.types import Selection
from kernels_pallas.ema import ema


def running_sum(x: jax.Array) -> jax.Array:
    """f32 of the shape of x [batch, n, width]: the sum of each position and those before it."""
    if seq_shards() == 1 or along(x.shape[1]) is None:
        return jnp.cumsum(x.astype(jnp.float32), axis=1)

    def local(x: jax.Array) -> jax.Array:
        comm, own = communicator_of_rows(), jnp.cumsum(x.astype(jnp.float32), axis=1)
        totals = comm.gather(own[None, :, -1])
        earlier = jnp.arange(comm.size, dtype=jnp.int32) < comm.index()
        return own + jnp.where(earlier[:, None, None], totals, 0).sum(0)[:, None]

    return sharded(local, [ROW], ROW)(x)


def moving_average(z: jax.Array, p: jax.Array, *, starts: jax.Array | None, initial: jax.Array | None) -> jax.Array:
    """`kernels_pallas.ema.ema`, each device computing its own part of its own rows. What one hands to the next is an
    affine map of the average before it: all are gathered, [batch, width] of each device."""
    split = seq_shards() > 1 and along(z.shape[1]) is not None

    def local(z: jax.Array, p: jax.Array, starts: jax.Array | None, initial: jax.Array | None) -> jax.Array:
        if not split:
            return ema(z, p, starts=starts, initial=initial)
        comm, own = communicator_of_rows(), ema(z, p, starts=starts)
        kept = 1 - p.astype(jnp.float32)
        kept = jnp.cumprod(kept if starts is None else jnp.where(starts, 0.0, kept), axis=1)
        first = jnp.zeros((len(z), z.shape[2]), jnp.float32) if initial is None else initial.astype(jnp.float32)
        after = lambda average, part: (part[0][:, None] * average + part[1], average)  # noqa: E731
        _, before = jax.lax.scan(after, first, (comm.gather(kept[None, :, -1]), comm.gather(own[None, :, -1])))
        mine = jax.lax.dynamic_index_in_dim(before, comm.index(), keepdims=False)
        return own + kept[..., None] * mine[:, None]

    rows = ("batch", "seq" if split else None)
    names = [rows, rows, None if starts is None else rows, None if initial is None else SLOT]
    return sharded(local, names, rows)(z, p, starts, initial)


def filled(z: jax.Array, selection: Selection, mask: jax.Array) -> jax.Array:
    """z [batch, slots, width] -> [batch, n, width]: at each position what the last slot at or before it has; slots are
    those of `mask` bool[batch, n]. At positions before the first, anything finite.

    Slots go back to their positions, and of each part of the sequence the last one to the parts behind it.
    """
    n = mask.shape[1]
    if seq_shards() == 1 or None in (along(n), along(z.shape[1])):
        return boundaries.filled(z, selection, mask)
    at = jnp.where(selection.valid, selection.indices, n)
    placed = added(jnp.zeros((len(z), n, z.shape[2]), z.dtype), at, z)

    def local(placed: jax.Array, mask: jax.Array) -> jax.Array:
        comm, length = communicator_of_rows(), mask.shape[1]
        last = jax.lax.cummax(jnp.where(mask, jnp.arange(length, dtype=jnp.int32), -1), axis=1)
        own = jnp.take_along_axis(placed, jnp.maximum(last, 0)[..., None], axis=1)
        has = comm.gather(last[None, :, -1] >= 0)
        number = jnp.arange(comm.size, dtype=jnp.int32)[:, None]
        source = jnp.where(has & (number < comm.index()), number, -1).max(0)
        ends = comm.gather(own[None, :, -1])
        earlier = jnp.take_along_axis(ends, jnp.maximum(source, 0)[None, :, None], axis=0)[0]
        return jnp.where((last < 0)[..., None], earlier[:, None], own)

    return sharded(local, [ROW, ROW], ROW)(placed, mask)
