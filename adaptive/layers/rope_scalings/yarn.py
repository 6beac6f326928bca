"""YaRN (Peng et al. 2023, arXiv 2309.00071): slow channels interpolated, fast ones left, and sharper attention."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.rope_scalings import Scaling, plain_frequencies
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scaling):
    """Channels that turn more than `fast` times within `trained` positions stay, those below `slow` are divided."""

    factor: float = ranged(4.0, least=1)
    trained: int = ranged(4096, least=1)
    fast: float = ranged(32.0, above=0)
    slow: float = ranged(1.0, above=0)
    attention: float = ranged(
        0.0, least=0
    )  # what cos and sin are multiplied by; 0: 1 + 0.1 ln(factor), as in the paper
    truncate: bool = True  # the bounds between fast and slow to whole channels

    def check(self, theta: float, at: str) -> None:
        if theta <= 1:
            raise RecipeError(f"{at}=yarn needs a rope_theta above 1, not {theta:g}")
        if self.fast <= self.slow:
            raise RecipeError(f"{at}.fast={self.fast:g} must be above {at}.slow={self.slow:g}")

    def magnitude(self) -> float:
        return self.attention or 0.1 * math.log(self.factor) + 1

    def frequencies(self, positions: jax.Array, dim: int, theta: float) -> jax.Array:
        low, high = (self._channel(turns, dim, theta) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (jnp.arange(dim // 2, dtype=jnp.float32) - low) / ((high - low) or 0.001)
        divided = jnp.clip(ramp, 0, 1)
        plain = plain_frequencies(dim, theta)
        return plain / self.factor * divided + plain * (1 - divided)

    def _channel(self, turns: float, dim: int, theta: float) -> float:
        """The channel that turns so often within the trained positions."""
        return dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
