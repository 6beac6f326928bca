"""Confidence threshold (Fast-dLLM, Wu et al. 2025, arXiv 2505.22618): all that is sure is written at once."""

import dataclasses

import jax

from adaptive.inference.diffusion.policies import Policy, Seen, likeliest
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Every position whose proposal has at least this probability, and always the likeliest."""

    threshold: float = ranged(0.9, least=0)  # 0 writes a block at once, above 1 one position at a time

    def writes(self, seen: Seen) -> jax.Array:
        return (seen.open & (seen.confidence >= self.threshold)) | likeliest(seen)
