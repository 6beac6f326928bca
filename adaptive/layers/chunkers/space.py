"""Chunks at spaces: SpaceByte (paper, section 3; released code, spacebyte.py)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.chunkers import BEGIN, Chunker, ChunkerModule, Heard


@dataclasses.dataclass(frozen=True)
class Settings(Chunker):
    """A chunk at each byte like a space after one that is not; for the outermost stage."""

    reads: ClassVar[str] = "bytes"

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Space()

    def rule(self) -> str:
        return "where a blank or a mark follows a letter"

    def expected(self) -> float:
        return 6.0  # of English, H-Net paper, section 3.1


class Space(ChunkerModule):
    """Reads the bytes."""

    def begins(self, heard: Heard) -> jax.Array:
        if heard.tokens is None or heard.earlier is None:
            raise RecipeError("the chunker space reads bytes: it is for the outermost stage")
        return (space_like(heard.tokens) & ~space_like(heard.earlier)) | (heard.tokens == BEGIN)


def space_like(byte: jax.Array) -> jax.Array:
    """Whether bytes are neither ASCII letters or digits nor continue a UTF-8 character."""
    alphanumeric = jnp.zeros(byte.shape, bool)
    for low, high in ("09", "AZ", "az"):
        alphanumeric = alphanumeric | ((byte >= ord(low)) & (byte <= ord(high)))
    return ~alphanumeric & ((byte < 128) | (byte >= 192))
