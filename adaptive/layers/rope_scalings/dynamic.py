"""A base that grows with the text ("dynamic NTK"), as the transformers library has it.

Frequencies follow from the last position of a row in the call, so that a text longer than `trained` is read by others
than its beginning was: keys that a cache holds stay as they were rotated, in the library as here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.layers.rope_scalings import Scaling, plain_frequencies
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scaling):
    """Up to `trained` positions nothing changes."""

    factor: float = ranged(2.0, least=1)
    trained: int = ranged(2048, least=1)

    def frequencies(self, positions: jax.Array, dim: int, theta: float) -> jax.Array:
        if dim < 4:
            return plain_frequencies(dim, theta)
        length = jnp.maximum(positions.max(axis=1) + 1, self.trained).astype(jnp.float32)
        grown = self.factor * length / self.trained - (self.factor - 1)
        return plain_frequencies(dim, (theta * grown ** (dim / (dim - 2)))[:, None, None])
