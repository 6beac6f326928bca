"""Rotary position embedding, rotate-half pairing (first half of the head with the second)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
    """cos and sin f32[batch, seq, head_dim / 2] at the positions of a set of tokens."""

    cos: jax.Array
    sin: jax.Array


def rope_at(positions: jax.Array, head_dim: int, theta: float) -> Rope:
    """Tables for `positions` i32[batch, seq], always in float32: frequencies theta^(-2i / head_dim)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """x [batch, seq, heads, head_dim] rotated by its positions; same dtype. Tables of fewer columns than half a head
    rotate the head's first channels alone."""
    cos = rope.cos.astype(x.dtype)[:, :, None, :]
    sin = rope.sin.astype(x.dtype)[:, :, None, :]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
