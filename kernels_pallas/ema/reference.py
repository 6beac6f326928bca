"""Exponential moving average in plain jax.numpy: the specification that every implementation is tested against."""

import jax
import jax.numpy as jnp
from jax import lax


def ema(z: jax.Array, p: jax.Array, *, starts: jax.Array | None = None, initial: jax.Array | None = None) -> jax.Array:
    """out_k = p_k z_k + (1 - p_k) out_{k-1} (H-Net paper, equation 5), one position after another.

    z        [batch, n, width]
    p        [batch, n]
    starts   bool[batch, n]: out_{k-1} counts as 0 there
    initial  [batch, width]: out_{-1}, 0 unless given
    returns  f32[batch, n, width]
    """
    z, p = z.astype(jnp.float32), p.astype(jnp.float32)
    keep = 1 - p if starts is None else jnp.where(starts, 0, 1 - p)
    first = jnp.zeros_like(z[:, 0]) if initial is None else initial.astype(jnp.float32)

    def step(past, at):
        z, p, keep = at
        out = p[:, None] * z + keep[:, None] * past
        return out, out

    return lax.scan(step, first, (z.swapaxes(0, 1), p.T, keep.T))[1].swapaxes(0, 1)
