"""Rotary embeddings for texts longer than those a model was trained on: how frequencies are changed. One file each,
found by its name, with a dataclass `Settings` below `Scaling`."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from adaptive.settings import Member


@dataclasses.dataclass(frozen=True)
class Scaling(Member):
    """Settings of a change of rotary frequencies."""

    door: ClassVar[str] = __name__

    def frequencies(self, positions: jax.Array, dim: int, theta: float) -> jax.Array:
        """f32, broadcast to [rows, n, dim / 2]: what `positions` i32[rows, n] are multiplied by."""
        raise NotImplementedError

    def check(self, theta: float, at: str) -> None:
        """Raises RecipeError for settings that cannot work with this base; `at` is their dotted path."""

    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


def plain_frequencies(dim: int, theta: float | jax.Array) -> jax.Array:
    """theta^(-2i / dim) f32[..., dim / 2], of rotary embeddings that nothing changes."""
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
