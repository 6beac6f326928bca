"""What every form by blocks needs of each position: its decay from the start of the block and to the end of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """A sequence of whole blocks, and float32 factors of its positions.

    x       [batch, blocks * size, heads, dim]
    b, c    [batch, blocks * size, n]
    total   [batch, heads, blocks, size]: running sum of dt * a within the block, so that position t reads what position
            s <= t of its run wrote times exp(total_t - total_s)
    dt      likewise: what is written is times dt
    into    likewise: what is read of the state before the block is times this; 0 in runs that began since
    out_of  likewise: dt and the decay up to the state after the block; 0 in runs that have ended by then

    The state before a block is times its last `into` in the state after it.
    """

    x: jax.Array
    b: jax.Array
    c: jax.Array
    total: jax.Array
    dt: jax.Array
    into: jax.Array
    out_of: jax.Array


def prepared(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, runs: jax.Array, size: int
) -> Inputs:
    """The inputs in blocks of `size`; runs in whole blocks already. Positions added neither decay nor write: dt = 0."""
    x, dt, b, c = (whole(v, size) for v in (x, dt, b, c))
    kind = accumulator(x)
    dt = dt.astype(kind).reshape(dt.shape[0], -1, size, dt.shape[2]).transpose(0, 3, 1, 2)
    total = jnp.cumsum(dt * a.astype(kind)[:, None, None], axis=-1)
    run = runs.reshape(runs.shape[0], 1, -1, size)
    last = run[..., -1:]
    before = jnp.pad(last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    into = jnp.where(run == before, jnp.exp(total), 0)
    out_of = jnp.where(run == last, dt * jnp.exp(total[..., -1:] - total), 0)
    return Inputs(x, b, c, total, dt, into, out_of)


def whole(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """x [batch, seq, ...] with positions added for whole blocks: 0, or with mode "edge" like the last."""
    missing = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), mode=mode) if missing else x


def runs_of(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """i32[batch, seq]: how often the segment changed up to each position."""
    if segments is None:
        return jnp.zeros(x.shape[:2], jnp.int32)
    changes = (segments[:, 1:] != segments[:, :-1]).astype(jnp.int32)
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def accumulator(x: jax.Array) -> jnp.dtype:
    """The dtype of sums and states: float32, or x's own where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)
