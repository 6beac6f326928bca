"""RMSNorm and LayerNorm."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.site import param

Kind = Literal["rms", "layer"]


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in float32, returned in x's dtype.

    The backward pass keeps x alone and computes the rest again, which is cheaper than to write and read it.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, initialised to one."""

    def __init__(self, width: int, eps: float, stack: tuple[int, ...] = ()):
        self.weight = param(jnp.ones((*stack, width)), (None,), stack=stack, role="scale")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape and dtype."""
        return rms_norm(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last axis, in float32."""

    def __init__(self, width: int, eps: float, stack: tuple[int, ...] = ()):
        self.weight = param(jnp.ones((*stack, width)), (None,), stack=stack, role="scale")
        self.bias = param(jnp.zeros((*stack, width)), (None,), stack=stack, role="bias")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


def make_norm(kind: Kind, width: int, eps: float, stack: tuple[int, ...] = ()) -> RMSNorm | LayerNorm:
    return LayerNorm(width, eps, stack) if kind == "layer" else RMSNorm(width, eps, stack)


def norm_size(kind: Kind, width: int) -> int:
    """Parameters of a norm."""
    return 2 * width if kind == "layer" else width
