"""Frequencies of Llama 3.1: long wavelengths divided, short ones left, those between interpolated."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.rope_scalings import Scaling, plain_frequencies
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scaling):
    """Channels that turn fewer than `low` times within `trained` positions are divided, those above `high` stay."""

    factor: float = ranged(8.0, least=1)
    low: float = ranged(1.0, above=0)
    high: float = ranged(4.0, above=0)
    trained: int = ranged(8192, least=1)

    def check(self, theta: float, at: str) -> None:
        if self.high <= self.low:
            raise RecipeError(f"{at}.high={self.high:g} must be above {at}.low={self.low:g}")

    def frequencies(self, positions: jax.Array, dim: int, theta: float) -> jax.Array:
        plain = plain_frequencies(dim, theta)
        turns = self.trained * plain / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (1 - kept) * plain / self.factor + kept * plain
