"""ReMoE: a ReLU router kept sparse by an adaptive L1 loss (arXiv 2412.14711), as BlockFFN's baselines have it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, ExpertRouter, Routing
from adaptive.layers.moe.routers.blockffn import rms_normalised, shared_among_neighbours
from adaptive.layers.moe.varying import by_weight, check_slack, how_computed, refuse_capacity
from adaptive.layers.moe_config import Execution, MoEConfig
from adaptive.layers.site import Site
from adaptive.routing.masked import tokens_in


@dataclasses.dataclass(frozen=True)
class Options:
    """ReMoE: the defaults."""

    l1_coefficient: float = 1e-8  # at the start, and at least
    rise: float = 1.2  # by which the coefficient is multiplied or divided after each step
    normalise: bool = False  # weights are RMS-normalised over experts, with a gain
    norm_eps: float = 1e-5
    row_slack: float = 0.0  # of a bound on a sequence's pairs in training: slack * experts_per_token per token; 0: none


class Router(ExpertRouter):
    """weights are relu(x weight), not normalised; an expert is active where they are above 0.

    weight       f32[width, experts]
    gain         f32[experts], of normalise=true
    coefficient  f32[], a buffer: of the L1 loss

    model.moe.experts_per_token = K is a target alone, and nothing is cut to it. After each step the coefficient is
    multiplied by `rise` if the share of active pairs, over all layers of a stack, is above K / experts, else divided by
    it, never below its start. model.moe.balance_coefficient has no part: the L1 loss balances as well.

    l1_loss           E / (T^2 K) sum_e (sum_t g_te) n_e over T tokens, n_e those that activate e
    weighted_l1_loss  the same times the coefficient, which is what is trained

    stats, besides the common: those of BlockFFN's metrics.
    """

    Options = Options

    def __init__(self, config: MoEConfig, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        o: Options = self.options
        refuse_capacity(config)
        check_slack(o.row_slack)
        if o.rise <= 1 or o.l1_coefficient < 0:
            raise RecipeError(
                f"model.moe.options: rise={o.rise:g}, l1_coefficient={o.l1_coefficient:g}: rise must be above 1 and "
                "l1_coefficient at least 0"
            )
        ones = jnp.ones((*site.stack, config.experts))
        self.gain = nnx.Param(ones, axes=(None,) * ones.ndim) if o.normalise else None
        self.coefficient = site.buffer(jnp.full((), o.l1_coefficient))

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        weights = jax.nn.relu(logits)
        if self.gain is not None:
            weights = rms_normalised(weights, o.norm_eps) * self.gain[...]
        dispatch, load, stats = by_weight(c, logits, weights, logits > 0, o.row_slack, context)
        present = weights if context.present is None else jnp.where(context.present[..., None], weights, 0.0)
        tokens = tokens_in(logits, context.present)
        l1 = c.experts / (tokens**2 * c.experts_per_token) * (present.sum((0, 1)) * load).sum()
        losses = {"l1_loss": l1, "weighted_l1_loss": self.coefficient[...] * l1}
        return Routing(dispatch, losses, stats | shared_among_neighbours(logits > 0, context), {}, logits)

    def coefficients(self) -> dict[str, float]:
        return {"l1_loss": 0.0, "weighted_l1_loss": 1.0}

    def update(self, stats: dict[str, jax.Array]) -> None:
        c, o = self.config, self.options
        share = stats["claimed"].sum() / jnp.maximum(stats["tokens"].sum() * c.experts, 1.0)
        factor = jnp.where(share > c.experts_per_token / c.experts, o.rise, 1 / o.rise)
        self.coefficient[...] = jnp.maximum(self.coefficient[...] * factor, o.l1_coefficient)

    def execution(self, context: Context) -> Execution:
        return how_computed(self.config, self.options.row_slack, context)

    def selects_alike(self) -> bool:
        return not self.options.row_slack
