"""The factor rule of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): the more are written at once, the surer each is."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.inference.diffusion.policies import Policy, Seen, best, likeliest
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """The n likeliest, for the largest n with (n + 1) (1 - confidence of the n-th) below `factor`, and at least one."""

    factor: float = ranged(1.0, above=0)

    def writes(self, seen: Seen) -> jax.Array:
        sure = -jnp.sort(jnp.where(seen.open, -seen.confidence, jnp.inf), axis=1)
        number = jnp.arange(1, sure.shape[1] + 1)
        many = ((number + 1) * (1 - sure) < self.factor).sum(1, dtype=jnp.int32)
        return best(seen.confidence, seen.open, many) | likeliest(seen)
