"""Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

import dataclasses

import jax

from adaptive.layers.rope_scalings import Scaling, plain_frequencies
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scaling):
    factor: float = ranged(2.0, least=1)

    def frequencies(self, positions: jax.Array, dim: int, theta: float) -> jax.Array:
        return plain_frequencies(dim, theta) / self.factor
