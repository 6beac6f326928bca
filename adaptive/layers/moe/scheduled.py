"""Expert choice whose capacity follows how much of a text is hidden (EC-DLM, arXiv 2604.01622, section 4).

Every sequence has its own number of experts per token, so it has its own number of rows; what a step computes is fixed.
`rows_of` consecutive sequences share rows for their average and `row_slack` more. Masked shares that are drawn one from
each of as many strata never need more than what `check` asks for; where other draws do, the sequences with most rows
give some up, every expert the lowest of its scores, and these count as dropped.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.settings import MoESettings, Scored
from adaptive.routing import capacity_schedules
from adaptive.routing.capacity_schedules import SIGMA, budget, mean_share, most_of_strata
from adaptive.settings import divisors, ranged

Schedule = Literal[
    "static",
    "linear",
    "linear_reverse",
    "cosine",
    "cosine_reverse",
    "gaussian",
    "gaussian_reverse",
    "bell",
    "bell_reverse",
]


class Shared(NamedTuple):
    """So many consecutive `sequences` have at most `rows` of an expert between them."""

    sequences: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Scheduled(Scored):
    """k_min and k_max are those of `budget`, experts_per_token its average over uniform shares."""

    schedule: Schedule = "static"  # how experts per token follow the masked share, where an objective tells it
    k_min: int = ranged(0, least=0)
    k_max: int = ranged(0, least=0)
    sigma: float = ranged(SIGMA, above=0)  # of gaussian
    row_slack: float = ranged(1.125, least=0)  # rows of a training step over the average; 0: as many as k_max needs
    rows_of: int = ranged(8, least=1)  # consecutive sequences that share rows

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if self.schedule == "static":
            return
        here, k = f"{at}.router.", self.experts_per_token
        capacity_schedules.check(self.schedule, self.k_min, self.k_max, self.sigma, here)
        if self.k_max > config.experts:
            raise RecipeError(f"{here}k_max={self.k_max}: must be at most {at}.experts={config.experts}")
        mean = self._average(mean_share(self.schedule, self.sigma))
        if abs(mean - k) > 0.02 * k:
            raise RecipeError(
                f"{here}schedule={self.schedule} from k_min={self.k_min} to k_max={self.k_max} takes {mean:.4g} "
                f"experts per token on average: set {here}experts_per_token={mean:.4g}, not {k:g}, or other ends"
            )
        least = self._average(most_of_strata(self.schedule, self.rows_of, self.sigma)) / mean
        if self.row_slack and self.row_slack < least:
            enough = math.ceil(1000 * least) / 1000
            raise RecipeError(
                f"{here}row_slack={self.row_slack:g}: under schedule={self.schedule}, sequences that share rows by "
                f"{here}rows_of={self.rows_of} can need {enough:g} times their average rows: set "
                f"{here}row_slack={enough:g}, raise {here}rows_of, or set {here}row_slack=0 for as many rows as k_max "
                "needs"
            )

    def _average(self, share: float) -> float:
        return self.k_min + share * (self.k_max - self.k_min)

    def unread(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.schedule == "static":
            found |= dict.fromkeys(("k_min", "k_max", "row_slack", "rows_of"), "schedule=static: experts_per_token")
        if not self.schedule.startswith("gaussian"):
            found["sigma"] = f"schedule={self.schedule}"
        return found

    def unread_under(self, objective: Any) -> dict[str, str]:
        """Fields that mean nothing under an objective (`adaptive.objectives`), and why."""
        if self.schedule == "static" or objective.denoising() is not None:
            return {}
        return {"schedule": f"objective={objective.kind()} hides no tokens"}

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.row_slack"

    def by_ratio(self, mask_ratio: jax.Array) -> jax.Array:
        """i32[batch]: experts per token of sequences of which such shares f32[batch] are hidden."""
        return budget(self.schedule, mask_ratio, self.k_min, self.k_max, self.sigma)

    def shared(self, config: MoESettings, batch: int, seq: int) -> Shared | None:
        """The rows of a training step with `batch` sequences; None: as many as k_max needs of each."""
        if not self.row_slack:
            return None
        together = max(n for n in divisors(batch) if n <= self.rows_of)
        most = self._average(most_of_strata(self.schedule, together, self.sigma))
        each = max(most, self.row_slack * self.experts_per_token)  # experts per token
        rows = math.ceil(round(together * seq * each / config.experts, 9))
        return Shared(together, rows) if rows < together * (seq * self.k_max // config.experts) else None


def fitted(wanted: jax.Array, rows: int, most: int) -> jax.Array:
    """i32[groups, n]: of the rows i32[groups, n] that the n sequences of each group want, at most `most` each, those
    that they get where all have `rows`. The largest wishes are cut to one level, from the last sequence on."""
    total = jnp.minimum(wanted[..., None], jnp.arange(most + 1)).sum(-2)
    level = (total <= rows).sum(-1, keepdims=True) - 1
    above = wanted > level
    spare = rows - jnp.minimum(wanted, level).sum(-1, keepdims=True)
    return jnp.minimum(wanted, level) + (above & (jnp.cumsum(above, axis=-1) <= spare))
