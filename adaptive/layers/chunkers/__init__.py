"""Chunkers: what decides where a chunk begins. One file each, found by its name, with a dataclass `Settings` below
`Chunker` and the module that it builds. A learned one has parameters: its probabilities smooth the chunks, and a ratio
loss steers them."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.cost import Cost
from adaptive.routing.boundaries import Boundaries
from adaptive.routing.types import AuxLosses
from adaptive.settings import Member

BEGIN = 254  # begins a document in H-Net's bytes


class Heard(NamedTuple):
    """What a chunker may look at: every position and its past.

    hidden, before   [batch, n, width]  the encoder's output at each position and at the one before it
    first            bool[batch, n]     positions that begin a document
    number           i32[batch, n]      place in the document
    tokens, earlier  i32[batch, n]      the bytes and those before them; None but at the first stage
    given            bool[batch, n]     boundaries that came with the batch; None: none did
    key              PRNG key where training adds noise; None: no noise
    """

    hidden: jax.Array
    before: jax.Array
    first: jax.Array
    number: jax.Array
    tokens: jax.Array | None = None
    earlier: jax.Array | None = None
    given: jax.Array | None = None
    key: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Chunker(Member):
    """Settings of a chunker."""

    door: ClassVar[str] = __name__
    learned: ClassVar[bool] = False
    reads: ClassVar[str] = ""  # "bytes" or "boundaries", which the outermost stage alone has; "": neither

    def build(self, width: int, std: float, key: jax.Array) -> "ChunkerModule":
        raise NotImplementedError

    def kernels(self) -> tuple[str, ...]:
        """Operations that it computes with, each a package of `kernels_pallas` or "routing"."""
        return ("routing", "ema") if self.learned else ("routing",)

    def rule(self) -> str:
        """Where a chunk begins, in words that follow "a chunk begins"; "" where that is learned."""
        return ""

    def expected(self) -> float:
        """Positions per chunk that are aimed at, or that the rule gives on ordinary text."""
        raise NotImplementedError

    def check(self, at: str) -> None:
        """Raises RecipeError for settings that cannot work; `at` is their dotted path."""

    def losses(
        self, found: Boundaries, exists: jax.Array, stage: int, shards: int
    ) -> tuple[AuxLosses, dict[str, jax.Array]]:
        """(auxiliary losses, further scalars) of its decisions in this stage; nothing of a rule."""
        return AuxLosses(), {}

    def parameters(self, width: int) -> int:
        """Parameters in a stream of this width."""
        return 0

    def cost(self, width: int, positions: float) -> Cost:
        """FLOPs of deciding about so many positions, each of which is multiplied with all parameters."""
        forward = 2.0 * positions * self.parameters(width)
        return Cost(router=forward, router_train=3 * forward)


class ChunkerModule(nnx.Module):
    """Decides every position from itself and its past, which keeps the model causal. A document's first position
    begins a chunk."""

    def __call__(self, heard: Heard) -> Boundaries:
        """Of every position [batch, n]; a rule is certain, so its probabilities are 1 and 0."""
        wanted = heard.first | self.begins(heard)
        return Boundaries(wanted.astype(jnp.float32), wanted)

    def begins(self, heard: Heard) -> jax.Array:
        """bool[batch, n]: whether a chunk begins, for positions that are no document's first."""
        raise NotImplementedError
