"""No chunking: every position is a chunk of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.layers.chunkers import Chunker, ChunkerModule, Heard


@dataclasses.dataclass(frozen=True)
class Settings(Chunker):
    """A chunk at every position."""

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Everywhere()

    def rule(self) -> str:
        return "everywhere"

    def expected(self) -> float:
        return 1.0


class Everywhere(ChunkerModule):
    """Chunks nothing."""

    def begins(self, heard: Heard) -> jax.Array:
        return jnp.ones(heard.first.shape, bool)
