"""LongCat-Flash: token choice with identity experts, whose use a controller holds (LongCat-Flash technical report)."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.choosing import limited, mask_of, present_pairs
from adaptive.layers.moe.settings import Limited, MoESettings
from adaptive.layers.site import Site
from adaptive.routing.balance import claims
from adaptive.routing.dispatch import by_token
from adaptive.routing.losses import Sums, updated_bias
from adaptive.routing.masked import choice_sums, zero_weights
from adaptive.routing.select import top_choices
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Limited):
    """LongCat-Flash: 512 experts, zero_experts=256, experts_per_token=12, true_experts=8, route_scale=6."""

    zero_experts: int = ranged(4, least=0)
    route_scale: float = 6.0
    true_experts: float = ranged(0.0, least=0)  # held mean of true experts per token; 0: k experts / choices
    bias_rate: float = ranged(0.001, least=0)  # of the balance among true experts; 0: none
    # Gains of the controller, times 1 / choices, the scale of a probability. The report prints none: ours.
    proportional: float = 0.02
    integral: float = 0.01
    derivative: float = 0.0

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if self.true_experts > self.experts_per_token:
            raise RecipeError(
                f"{at}.router.true_experts={self.true_experts:g}: must be above 0 and at most "
                f"{at}.router.experts_per_token={self.experts_per_token}; 0 takes the balanced share"
            )

    def zeros(self) -> int:
        return self.zero_experts

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if not self.zero_experts:
            gains = ("true_experts", "proportional", "integral", "derivative")
            found |= dict.fromkeys(gains, "zero_experts=0 leaves nothing to control")
        return found

    def target(self, config: MoESettings) -> float:
        """Mean of true experts per token that the controller holds."""
        return self.true_experts or self.experts_per_token * config.experts / config.choices

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        return tokens * self.target(config)


class Router(ExpertRouter):
    """p = softmax(x weight) -> top-k of p + bias; weights are p times route_scale, not renormalised.

    weight  f32[width, experts + zero_experts]: true experts first
    bias    f32[experts + zero_experts], a buffer: on the choice alone; that of zero experts stays
    errors  f32[2], a buffer: the controller's last two errors

    A zero expert returns its input: the output holds x times the weights of those that were chosen.

    After each step the biases of true experts move by the loss-free rule among themselves (bias_rate), and all alike by
    a PID controller in velocity form on the error e = 1 - mean true experts per token / true_experts:
    (proportional (e - e1) + integral e + derivative (e - 2 e1 + e2)) / choices.

    load_balancing_loss  E sum_e P_e n_e / sum n over true experts alone, P normalised over them: 1 when balanced
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        super().__init__(config, site, key)
        self.k = self.options.experts_per_token
        self.target = self.options.target(config)
        self.bias = site.buffer(jnp.zeros(self.choices))
        self.errors = site.buffer(jnp.zeros(2))

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        p = jax.nn.softmax(logits, axis=-1)
        index = top_choices(context.among(p + self.bias[...]), self.k)
        weights = jnp.take_along_axis(p, index, axis=-1) * o.route_scale
        wanted = context.wanted(index, present_pairs(index, context.present))
        valid, bounds = limited(c, index, weights, wanted & (index < c.experts), context)
        identity = zero_weights(index, weights, wanted, c.experts, o.zero_experts)
        dispatch = by_token(index, weights, valid, c.experts, zero_weights=identity, **bounds)
        load = claims(index, wanted, self.choices).sum(0)
        losses = {
            "load_balancing_loss": true_balance(p, load, c.experts, context.present),
            "router_z_loss": z_loss(logits, context.present),
        }
        stats = statistics(dispatch, logits, load, context.present)
        return Routing(dispatch, losses, stats, {}, logits, mask_of(index, wanted, self.choices))

    def zero_output(self, x: jax.Array, weights: jax.Array) -> jax.Array | None:
        return x.astype(jnp.float32) * weights.sum(-1, keepdims=True) if self.zero_experts else None

    def update(self, stats: dict[str, jax.Array]) -> None:
        o, n = self.options, self.config.experts
        load = stats["claimed"][..., :n]
        mean_true = load.sum(-1) / jnp.maximum(stats["tokens"], 1.0)
        error, before = 1 - mean_true / self.target, self.errors[...]
        move = (
            o.proportional * (error - before[..., 0])
            + o.integral * error
            + o.derivative * (error - 2 * before[..., 0] + before[..., 1])
        ) / self.choices
        balance = jnp.vectorize(lambda b, n: updated_bias(b, n, o.bias_rate), signature="(e),(e)->(e)")
        true = balance(self.bias[..., :n], load) + (move[..., None] if self.zero_experts else 0.0)
        self.bias[...] = jnp.concatenate([true, self.bias[..., n:]], axis=-1)
        self.errors[...] = jnp.stack([error, before[..., 0]], axis=-1)

    def selects_alike(self) -> bool:
        return not self.options.capacity_factor


def true_balance(probabilities: jax.Array, load: jax.Array, experts: int, present: jax.Array | None) -> Summed:
    """E sum_e P_e n_e / sum n over the first `experts` choices alone, P_e their normalised mean probabilities.

    probabilities f32[batch, seq, choices], load f32[choices]. 1 when these are balanced, whatever the others get.
    """
    return Summed(choice_sums(probabilities[..., :experts], load[:experts], present), _true_share)


def _true_share(sums: Sums) -> jax.Array:
    share = sums["claims"] / jnp.maximum(sums["claims"].sum(), 1.0)
    total = sums["weight"].sum()
    return share.size * (share * sums["weight"]).sum() / jnp.where(total > 0, total, 1.0)  # 0 without tokens
