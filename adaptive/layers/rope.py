"""Rotary position embedding, rotate-half pairing (first half of the head with the second)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.layers.rope_scalings import Scaling, plain_frequencies


class Rope(NamedTuple):
    """cos and sin f32[batch, seq, head_dim / 2] at the positions of a set of tokens."""

    cos: jax.Array
    sin: jax.Array


class Rotary(NamedTuple):
    """Which rotary embedding: channels that rotate, base, and how frequencies are changed."""

    dim: int
    theta: float
    scaling: Scaling | None = None


def rope_at(positions: jax.Array, rotary: Rotary) -> Rope:
    """Tables for `positions` i32[batch, seq], always in float32: frequencies theta^(-2i / dim), or as scaled."""
    dim, theta, scaling = rotary
    frequencies = plain_frequencies(dim, theta) if scaling is None else scaling.frequencies(positions, dim, theta)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    rope, by = Rope(jnp.cos(angles), jnp.sin(angles)), 1.0 if scaling is None else scaling.magnitude()
    return rope if by == 1 else Rope(rope.cos * by, rope.sin * by)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """x [batch, seq, heads, head_dim] rotated by its positions; same dtype. Tables of fewer columns than half a head
    rotate the head's first channels alone."""
    cos = rope.cos.astype(x.dtype)[:, :, None, :]
    sin = rope.sin.astype(x.dtype)[:, :, None, :]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
