"""Window-Diffusion (arXiv 2601.20332): masked positions far to the right are left out, near ones read from a cache."""

import dataclasses

import jax.numpy as jnp

from adaptive.errors import UserError
from adaptive.inference.diffusion.caches import Cache, Now, Pass
from adaptive.inference.diffusion.policies import Policy
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Cache):
    """Of the masked positions the first `outer` exist; of these the first `inner` are computed and may be written.
    Every `refresh` calls, and when fewer than `inner` are left, what is written and the first `outer` are computed."""

    outer: int = ranged(128, least=1)
    inner: int = ranged(32, least=1)
    refresh: int = ranged(32, least=1)

    def check(self, policy: Policy, most: int) -> None:
        if self.inner > self.outer:
            raise UserError(f"cache.inner={self.inner} is more than cache.outer={self.outer}, within which it lies")
        if policy.scheduled and most > self.inner:
            raise UserError(
                f"cache.inner={self.inner}: the schedule writes {most} positions at a call; give more steps"
            )

    def computes(self, now: Now) -> Pass:
        masked = now.masked & now.exists
        number = jnp.cumsum(masked, axis=1) - 1
        left = (masked & now.held).sum(1, keepdims=True)
        few = left < jnp.minimum(self.inner, masked.sum(1, keepdims=True))
        anew = (now.calls % self.refresh == 0) | few
        held = jnp.where(anew, now.exists & (~masked | (number < self.outer)), now.held)
        active = masked & held & (number < self.inner)
        return Pass(jnp.where(anew, held, active | (now.fresh & held)), held, active)
