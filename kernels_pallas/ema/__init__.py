"""Exponential moving average with a rate of its own at every position: what smooths the chunks of an H-Net.

`reference` is the specification. On TPUs `tpu`, on NVIDIA GPUs `gpu`, elsewhere `loop`: chosen when a program is
lowered for its target, so that compiling for a machine from another chooses the same.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.choice import by_platform
from kernels_pallas.ema import gpu, linear, loop, tpu
from kernels_pallas.grouped_matmul.varying import alike


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    own = {"tpu": "Pallas for TPUs", "gpu": "Pallas through Triton"}
    return own.get(platform, "a loop in XLA: Pallas kernels are for TPUs and NVIDIA GPUs")


def ema(z: jax.Array, p: jax.Array, *, starts: jax.Array | None = None, initial: jax.Array | None = None) -> jax.Array:
    """out_k = p_k z_k + (1 - p_k) out_{k-1} (H-Net paper, equation 5).

    z        [batch, n, width]
    p        [batch, n] in [0, 1]; 1 forgets the past exactly
    starts   bool[batch, n]: the past is forgotten there too, but the rate stays: out_k = p_k z_k
    initial  [batch, width]: out_{-1}, 0 unless given
    returns  f32[batch, n, width], computed in float32

    Gradients are those of z, p and initial; the backward pass keeps these, starts and the result. On several TPUs or
    GPUs it must be called inside `jax.shard_map`, as every kernel. Raises ValueError for shapes that do not match.
    """
    _check(z, p, starts, initial)
    batch, n, width = z.shape
    p = p.astype(jnp.float32)
    starts = jnp.zeros((batch, n), bool) if starts is None else starts
    initial = jnp.zeros((batch, width), jnp.float32) if initial is None else initial.astype(jnp.float32)
    if n <= 1:  # a step of generation
        return p[..., None] * z.astype(jnp.float32) + jnp.where(starts, 0, 1 - p)[..., None] * initial[:, None]
    return _ema(*alike(z, p, starts, initial))


@jax.custom_vjp
def _ema(z: jax.Array, p: jax.Array, starts: jax.Array, initial: jax.Array) -> jax.Array:
    return by_platform(
        z,
        p,
        starts,
        initial,
        tpu=functools.partial(linear.forward, tpu.recurrence),
        cuda=functools.partial(linear.forward, gpu.recurrence),
        default=loop.forward,
    )


def _ema_forward(z, p, starts, initial):
    out = _ema(z, p, starts, initial)
    return out, (z, p, starts, initial, out)


def _ema_backward(kept, d_out):
    d_z, d_p, d_initial = by_platform(
        *kept,
        d_out,
        tpu=functools.partial(linear.backward, tpu.recurrence),
        cuda=functools.partial(linear.backward, gpu.recurrence),
        default=loop.backward,
    )
    return d_z, d_p, None, d_initial


_ema.defvjp(_ema_forward, _ema_backward)


def _check(z: jax.Array, p: jax.Array, starts: jax.Array | None, initial: jax.Array | None) -> None:
    if z.ndim != 3:
        raise ValueError(f"z {z.shape}: must be [batch, n, width]")
    batch, n, width = z.shape
    expected = {"p": (p, (batch, n)), "starts": (starts, (batch, n)), "initial": (initial, (batch, width))}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} {array.shape}: must be {shape} for z {z.shape}")
