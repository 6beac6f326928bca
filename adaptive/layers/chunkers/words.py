"""Chunks where the batch says, as a splitter of words decided (HAT: `adaptive.data.words`)."""

import dataclasses
from typing import ClassVar

import jax

from adaptive.errors import RecipeError
from adaptive.layers.chunkers import Chunker, ChunkerModule, Heard


@dataclasses.dataclass(frozen=True)
class Settings(Chunker):
    """Words, with data.boundaries=words; for the outermost stage."""

    reads: ClassVar[str] = "boundaries"

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Given()

    def rule(self) -> str:
        return "where a word begins, as a splitter says"

    def expected(self) -> float:
        return 6.0  # of English with its spaces


class Given(ChunkerModule):
    """Reads the boundaries that came with the batch."""

    def begins(self, heard: Heard) -> jax.Array:
        if heard.given is None:
            raise RecipeError("the chunker words needs boundaries with the batch: set data.boundaries=words")
        return heard.given
