"""AdaMoE: token choice with null experts, so that the number of true experts adapts (arXiv 2406.13233)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.choosing import limited, mask_of, present_pairs
from adaptive.layers.moe.settings import Limited, MoESettings
from adaptive.layers.site import Site
from adaptive.routing.balance import claims
from adaptive.routing.dispatch import by_token
from adaptive.routing.losses import Product
from adaptive.routing.masked import choice_sums, softmax_over, zero_weights
from adaptive.routing.select import top_choices
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Limited):
    """The paper's Mixtral: 8 experts, null_experts=8, experts_per_token=3, balance_coefficient=0.02 and then
    late_coefficient=1e-4 after the first epoch."""

    null_experts: int = ranged(8, least=0)
    normalise: Literal["true", "all"] = "true"  # over which of the chosen: true experts (the paper), or nulls as well
    balance: Literal["paper", "share", "plain"] = "paper"  # the balancing loss as printed, or as one of the releases
    late_after: int = ranged(0, least=0)  # steps after which the balancing loss has `late_coefficient`; 0: never
    late_coefficient: float = ranged(1e-4, least=0)

    def zeros(self) -> int:
        return self.null_experts

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if not self.late_after:
            found["late_coefficient"] = "late_after=0"
        return found

    def coefficients(self) -> dict[str, float]:
        if not self.late_after:
            return super().coefficients()
        return super().coefficients() | {"load_balancing_loss": 0.0, "weighted_load_balancing_loss": 1.0}

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        return tokens * self.experts_per_token * config.experts / config.choices


class Router(ExpertRouter):
    """p = softmax(x [true, null]) -> top-k of all; null experts output 0 and cost nothing.

    weight   f32[width, experts + null_experts]: true experts first. `with_null_columns` extends a trained router
    updates  f32[], a buffer where late_after is above 0: steps so far

    Weights are p of the chosen true experts over their sum; a token that chose nulls alone gets 0.

    load_balancing_loss  (n + m) sum_i f_i P_i over all n + m experts, P_i the mean probability

    balance  f_i                                                                                       balanced
    paper    share of tokens that chose i, of nulls their mean: they need no balance among themselves  k
    share    the same as a share of all pairs (the release's experiment with LoRA experts)             1
    plain    share of tokens that chose i, nulls like all others (the release's Mixtral, in effect)    k

    With late_after the loss is trained as weighted_load_balancing_loss, its coefficient included.

    Capacities count as for token choice, nulls taking their share of a balanced load.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        o: Settings = self.options
        self.k = o.experts_per_token
        self.updates = site.buffer(jnp.zeros(())) if o.late_after else None

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        index = top_choices(context.among(logits), self.k)
        chosen = jnp.take_along_axis(logits, index, axis=-1)
        true = index < c.experts
        weights = softmax_over(chosen, true if o.normalise == "true" else jnp.ones_like(true))
        wanted = context.wanted(index, present_pairs(index, context.present))
        valid, bounds = limited(c, index, weights, wanted & true, context)
        nulls = zero_weights(index, weights, wanted, c.experts, o.null_experts)
        dispatch = by_token(index, weights, valid, c.experts, zero_weights=nulls, **bounds)
        load = claims(index, wanted, self.choices).sum(0)
        losses = self._balance(jax.nn.softmax(logits, axis=-1), load, context.present)
        losses["router_z_loss"] = z_loss(logits, context.present)
        stats = statistics(dispatch, logits, load, context.present)
        return Routing(dispatch, losses, stats, {}, logits, mask_of(index, wanted, self.choices))

    def _balance(self, probabilities: jax.Array, load: jax.Array, present: jax.Array | None) -> dict[str, Summed]:
        n, o = self.config.experts, self.options
        form = Product(self.choices / self.k if o.balance == "share" else float(self.choices))
        if o.null_experts and o.balance != "plain":
            load = jnp.concatenate([load[:n], jnp.broadcast_to(load[n:].mean(), o.null_experts)])
        sums = choice_sums(probabilities, load, present)
        losses = {"load_balancing_loss": Summed(sums, form)}
        if self.updates is None:
            return losses
        late = jnp.where(self.updates[...] >= o.late_after, o.late_coefficient, o.balance_coefficient)
        weighted = {**sums, "weight": late * sums["weight"]}
        return losses | {"weighted_load_balancing_loss": Summed(weighted, form)}

    def update(self, stats: dict[str, jax.Array]) -> None:
        if self.updates is not None:
            self.updates[...] = self.updates[...] + 1

    def selects_alike(self) -> bool:
        return not self.options.capacity_factor

    def no_gradient(self) -> str:
        if self.k > 1 and (self.config.experts > 1 or self.options.normalise == "all"):
            return ""
        return (
            f"with router.experts_per_token={self.k} of {self.config.experts} true experts the weight of the one "
            "that is chosen is always 1 and the router learns nothing: take at least 2 of at least 2"
        )


def with_null_columns(weight: jax.Array, null_experts: int) -> jax.Array:
    """A token-choice router f32[width, experts] as one with nulls, f32[width, experts + null_experts].

    The nulls' columns are copies of the experts', in order and over again (AdaMoE's conversion of trained models).
    Fine-tune the result with a larger k: at first a token's choices are its best experts and their copies, the true one
    of equals first.
    """
    copies = jnp.arange(null_experts) % weight.shape[1]
    return jnp.concatenate([weight, weight[:, copies]], axis=1)
