"""Chunks of one length: H-Net (pool) of the H-Net paper, section 3.1."""

import dataclasses

import jax

from adaptive.layers.chunkers import Chunker, ChunkerModule, Heard
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Chunker):
    """A chunk every `length` positions of a document."""

    length: int = ranged(6, least=2)

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Stride(self.length)

    def rule(self) -> str:
        return f"at every {self.length} positions"

    def expected(self) -> float:
        return float(self.length)


class Stride(ChunkerModule):
    """Counts from where the document begins."""

    def __init__(self, length: int):
        self.length = length

    def begins(self, heard: Heard) -> jax.Array:
        return heard.number % self.length == 0
