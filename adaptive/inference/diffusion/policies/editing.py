"""Token editing (LLaDA2.1): what was written may be replaced while its block is open. The release's thresholds are not
known; the defaults are ours."""

import dataclasses

import jax

from adaptive.inference.diffusion.policies import Policy, Seen, likeliest
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Masks as with `threshold`; tokens that decoding wrote become others that are proposed with `replace` or more."""

    replaces = True

    threshold: float = ranged(0.7, least=0)
    replace: float = ranged(0.9, least=0)  # above 1: nothing is replaced
    earlier: int = ranged(0, least=0)  # blocks before it that stay open

    def writes(self, seen: Seen) -> jax.Array:
        new = (seen.open & (seen.confidence >= self.threshold)) | likeliest(seen)
        others = seen.own & (seen.token != seen.tokens) & (seen.confidence >= self.replace)
        return new | (others & (seen.ago >= 0) & (seen.ago <= self.earlier))
