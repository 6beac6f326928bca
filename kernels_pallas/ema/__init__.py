"""Exponential moving average with a rate of its own at every position: what smooths the chunks of an H-Net.

`reference` is the specification.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.ema import plain
from kernels_pallas.grouped_matmul.varying import alike


def ema(z: jax.Array, p: jax.Array, *, starts: jax.Array | None = None, initial: jax.Array | None = None) -> jax.Array:
    """out_k = p_k z_k + (1 - p_k) out_{k-1} (H-Net paper, equation 5).

    z        [batch, n, width]
    p        [batch, n] in [0, 1]; 1 forgets the past exactly
    starts   bool[batch, n]: the past is forgotten there too, but the rate stays: out_k = p_k z_k
    initial  [batch, width]: out_{-1}, 0 unless given
    returns  f32[batch, n, width], computed in float32

    Gradients are those of z, p and initial; the backward pass keeps z, p, starts and the result. Raises ValueError for
    shapes that do not match.
    """
    _check(z, p, starts, initial)
    batch, n, width = z.shape
    if n == 0:
        return jnp.zeros(z.shape, jnp.float32)
    starts = jnp.zeros((batch, n), bool) if starts is None else starts
    initial = jnp.zeros((batch, width), jnp.float32) if initial is None else initial.astype(jnp.float32)
    return _ema(*alike(z, p.astype(jnp.float32), starts, initial))


@jax.custom_vjp
def _ema(z: jax.Array, p: jax.Array, starts: jax.Array, initial: jax.Array) -> jax.Array:
    return _recurrence(z, p, jnp.where(starts, 0, 1 - p), initial, reverse=False)


def _forward(z, p, starts, initial):
    out = _ema(z, p, starts, initial)
    return out, (z, p, starts, initial, out)


def _backward(kept, d_out):
    z, p, starts, initial, out = kept
    keep = jnp.where(starts, 0, 1 - p)
    after = jnp.pad(keep[:, 1:], ((0, 0), (0, 1)))  # how much of position k the position after it keeps
    total = _recurrence(d_out, jnp.ones_like(p), after, jnp.zeros_like(initial), reverse=True)
    past = jnp.where(starts[..., None], 0, jnp.concatenate([initial[:, None], out[:, :-1]], 1))
    d_p = (total * (z.astype(jnp.float32) - past)).sum(-1)
    return (p[..., None] * total).astype(z.dtype), d_p, None, keep[:, :1] * total[:, 0]


_ema.defvjp(_forward, _backward)


def _recurrence(x: jax.Array, gain: jax.Array, keep: jax.Array, initial: jax.Array, *, reverse: bool) -> jax.Array:
    return plain.by_steps(x, gain, keep, initial, reverse=reverse)


def _check(z: jax.Array, p: jax.Array, starts: jax.Array | None, initial: jax.Array | None) -> None:
    if z.ndim != 3:
        raise ValueError(f"z {z.shape}: must be [batch, n, width]")
    batch, n, width = z.shape
    expected = {"p": (p, (batch, n)), "starts": (starts, (batch, n)), "initial": (initial, (batch, width))}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} {array.shape}: must be {shape} for z {z.shape}")
