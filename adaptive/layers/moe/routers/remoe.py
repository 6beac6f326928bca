"""ReMoE: a ReLU router kept sparse by an adaptive L1 loss (arXiv 2412.14711), as BlockFFN's baselines have it."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.layers.moe.base import Context, ExpertRouter, Routing
from adaptive.layers.moe.routers.blockffn import rms_normalised, shared_among_neighbours
from adaptive.layers.moe.settings import Bounded, Execution, MoESettings
from adaptive.layers.moe.varying import by_weight, how_computed
from adaptive.layers.site import Site, param
from adaptive.routing.losses import Product
from adaptive.routing.masked import choice_sums
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Bounded):
    """ReMoE: the defaults."""

    l1_coefficient: float = ranged(1e-8, least=0)  # at the start, and at least
    rise: float = ranged(1.2, above=1)  # by which the coefficient is multiplied or divided after each step
    normalise: bool = False  # weights are RMS-normalised over experts, with a gain
    norm_eps: float = ranged(1e-5, above=0)

    def unread(self) -> dict[str, str]:
        return {} if self.normalise else {"norm_eps": "normalise=false"}

    def against_starving(self, at: str) -> str:
        return f"lower {at}.router.l1_coefficient or {at}.router.rise"

    def coefficients(self) -> dict[str, float]:
        return {"l1_loss": 0.0, "weighted_l1_loss": 1.0}

    def vectors(self, config: MoESettings, width: int) -> int:
        return config.experts if self.normalise else 0


class Router(ExpertRouter):
    """weights are relu(x weight), not normalised; an expert is active where they are above 0.

    weight       f32[width, experts]
    gain         f32[experts], of normalise=true
    coefficient  f32[], a buffer: of the L1 loss

    experts_per_token = K is a target alone, and nothing is cut to it. After each step the coefficient is multiplied by
    `rise` if the share of active pairs, over all layers of a stack, is above K / experts, else divided by it, never
    below its start. There is no balancing loss: the L1 loss balances as well.

    l1_loss           E / (T^2 K) sum_e (sum_t g_te) n_e over T tokens, n_e those that activate e
    weighted_l1_loss  the same times the coefficient, which is what is trained

    stats, besides the common: those of BlockFFN's metrics.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        o: Settings = self.options
        ones = jnp.ones((*site.stack, config.experts))
        self.gain = param(ones, (None,), stack=site.stack, role="scale") if o.normalise else None
        self.coefficient = site.buffer(jnp.full((), o.l1_coefficient))

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        weights = jax.nn.relu(logits)
        if self.gain is not None:
            weights = rms_normalised(weights, o.norm_eps) * self.gain[...]
        dispatch, load, stats = by_weight(c, logits, weights, logits > 0, o.row_slack, context)
        sums, form = choice_sums(weights, load, context.present), Product(c.experts / o.experts_per_token)
        weighted = {**sums, "weight": self.coefficient[...] * sums["weight"]}
        losses = {"l1_loss": Summed(sums, form), "weighted_l1_loss": Summed(weighted, form)}
        return Routing(dispatch, losses, stats | shared_among_neighbours(logits > 0, context), {}, logits)

    def update(self, stats: dict[str, jax.Array]) -> None:
        c, o = self.config, self.options
        share = stats["claimed"].sum() / jnp.maximum(stats["tokens"].sum() * c.experts, 1.0)
        factor = jnp.where(share > o.experts_per_token / c.experts, o.rise, 1 / o.rise)
        self.coefficient[...] = jnp.maximum(self.coefficient[...] * factor, o.l1_coefficient)

    def execution(self, context: Context) -> Execution:
        return how_computed(self.config, self.options.row_slack, context)

    def selects_alike(self) -> bool:
        return not self.options.row_slack
