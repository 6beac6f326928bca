"""Low-confidence remasking (LLaDA, Nie et al. 2025, arXiv 2502.09992): the likeliest proposals are written."""

import dataclasses

import jax

from adaptive.inference.diffusion.policies import Policy, Seen, best


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """As many as the schedule says, those of the highest probability."""

    scheduled = True

    def writes(self, seen: Seen) -> jax.Array:
        return best(seen.confidence, seen.open, seen.count)
