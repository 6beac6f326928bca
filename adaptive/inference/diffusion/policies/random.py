"""Random remasking (LLaDA, Nie et al. 2025, arXiv 2502.09992): places are written in a random order."""

import dataclasses

import jax

from adaptive.inference.diffusion.policies import Policy, Seen, best


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """As many as the schedule says, at random."""

    scheduled = True
    draws = True

    def writes(self, seen: Seen) -> jax.Array:
        assert seen.noise is not None
        return best(seen.noise, seen.open, seen.count)
