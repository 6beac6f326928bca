"""What a recurrence carries from shard to shard of a sequence (Gated DeltaNet's and Mamba's context parallelism).

A shard's state after it is an affine map of the state before it: a decay and what the shard adds. Every device computes
its own from a state of zeros, all of them are gathered, and each device folds those of the shards before its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adaptive.parallel.context.axis import Context
from adaptive.parallel.context.halo import extended
from kernels_pallas.ssd import runs_of
from kernels_pallas.ssd import ssd as on_one


def ssd(
    context: Context,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    segments: jax.Array | None,
    state: jax.Array,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.ssd.ssd` of whole rows, inside `jax.shard_map` over the context axis, where each device has its
    neighbouring part of x, dt, b, c and segments. The state, before the row and after it, is the same on all devices.

    What is gathered does not depend on the sequence's length: f32[batch, heads, dim, n] of each device.
    """
    y, added = on_one(x, dt, a, b, c, segments=segments, block=block)
    total = jnp.cumsum(dt * a, axis=1)  # [batch, seq, heads]
    first = runs_of(x, segments) == 0  # positions of the first segment here, which may have begun before
    decay = jnp.where(first[:, -1:], jnp.exp(total[:, -1]), 0)
    before = jnp.ones(x.shape[:1], bool)
    if segments is not None:
        past = extended(segments, context.axis, context.parts, 1, segments[:, :1])
        before = past[:, 0] == past[:, 1]

    def after(state: jax.Array, shard: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        decay, added, before = shard
        came = jnp.where(before[:, None, None, None], state, 0)
        return decay[..., None, None] * came + added, came

    maps = lax.all_gather((decay, added, before), context.axis)
    last, came = lax.scan(after, state.astype(added.dtype), maps)
    mine = lax.dynamic_index_in_dim(came, lax.axis_index(context.axis), keepdims=False)
    read = jnp.einsum("btn,bhpn->bthp", c, mine.astype(c.dtype), preferred_element_type=added.dtype)
    fade = jnp.exp(jnp.where(first[..., None], total, -jnp.inf))
    return (y.astype(read.dtype) + fade[..., None] * read).astype(x.dtype), last
