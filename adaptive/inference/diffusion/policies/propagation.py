"""Local-determinism propagation (LocalLeap, arXiv 2510.07081): beside sure positions less is asked of others. Radius
and thresholds of the paper are not known; the defaults are ours."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.inference.diffusion.policies import Policy, Seen, likeliest
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Anchors are positions with at least `anchor`; what is at most `radius` away from one needs `near` alone."""

    anchor: float = ranged(0.9, least=0)
    near: float = ranged(0.75, least=0)
    radius: int = ranged(4, least=0)

    def writes(self, seen: Seen) -> jax.Array:
        anchors = seen.open & (seen.confidence >= self.anchor)
        return anchors | (around(anchors, self.radius) & seen.open & (seen.confidence >= self.near)) | likeliest(seen)


def around(these: jax.Array, radius: int) -> jax.Array:
    """bool[rows, n]: positions at most `radius` away from these bool[rows, n]."""
    n = these.shape[1]
    total = jnp.pad(jnp.cumsum(these, axis=1), ((0, 0), (1, 0)))
    place = jnp.arange(n)
    return total[:, jnp.minimum(place + radius + 1, n)] > total[:, jnp.maximum(place - radius, 0)]
