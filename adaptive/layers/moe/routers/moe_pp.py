"""MoE++: zero, copy and constant experts beside true ones, and gating residuals (arXiv 2410.07348)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import scored
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.choosing import keeping, mask_of, present_pairs
from adaptive.layers.moe.settings import Limited, MoESettings
from adaptive.layers.site import Role, Site, normal_param
from adaptive.routing.balance import claims
from adaptive.routing.capacity import slots
from adaptive.routing.dispatch import by_token
from adaptive.routing.losses import Product
from adaptive.routing.masked import choice_sums, softmax_over, zero_weights
from adaptive.routing.select import top_choices
from adaptive.routing.types import Summed
from adaptive.settings import ranged

EXPANSION = 8  # hidden units of the two-layer gate per choice
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Settings(Limited):
    """The paper's small models: the defaults with input_scale=true and capacity_factor=1.1."""

    constant: int = ranged(2, least=0)  # experts a_1 x + a_2 v, (a_1, a_2) = softmax(x W_c)
    copy: int = ranged(1, least=0)  # experts x
    zero: int = ranged(1, least=0)  # experts 0
    gate: Literal["mlp", "linear"] = "mlp"  # tanh(x W1) W2, or x W1
    residual: bool = True  # add the logits of the layer below times W_g
    tau: float = ranged(0.75, above=0)  # weight of zero-computation experts in loss and capacity: less uses them more
    mixtral_gating: bool = False  # zero experts keep their share of the weights, and no input is scaled
    logits_norm: float = ranged(0.0, least=0)  # standard deviation given to each token's logits; 0: their own
    input_scale: bool = False  # experts read x times k, zero-computation ones too (released layer)
    capacity_of: Literal["token", "pair"] = "token"  # balanced load of T tokens (as printed), or of their T k pairs

    def zeros(self) -> int:
        return self.constant + self.copy + self.zero

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if not self.capacity_factor:
            found["capacity_of"] = "capacity_factor=0 drops nothing"
        if self.mixtral_gating:
            found["input_scale"] = "mixtral_gating=true scales no input"
        return found

    def true_share(self, config: MoESettings) -> float:
        """A true expert's share of a balanced load."""
        return self.tau / (self.tau * config.experts + self.zeros())

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        # The loss is balanced where true experts are chosen tau / (tau N_F + N_Z) of the time each.
        return tokens * self.experts_per_token * self.true_share(config) * config.experts

    def matrices(self, config: MoESettings, width: int) -> int:
        choices = config.choices
        gate = width * choices if self.gate == "linear" else EXPANSION * choices * (width + choices)
        return gate + self.residual * choices * choices + self.constant * 3 * width


class Router(ExpertRouter):
    """l = gate(x) + l_below W_g; p = softmax(l) -> top-k.

    Choices are the true experts, then constant, copy, zero ones. Ea is their number.

    weight         f32[width, 8 Ea]            W1; of gate=linear f32[width, Ea]
    second         f32[8 Ea, Ea]               W2, of gate=mlp alone
    residual       f32[Ea, Ea]                 W_g, unless residual=false; unused in the first layer
    constant_gate  f32[constant, width, 2]     W_c of each constant expert
    constant       f32[constant, width]        v of each

    A zero expert's weight is set to 0 before the k weights are divided by their sum, so a partner gets 1; a token that
    chose zero experts alone gets 0. l_below holds the residuals of all layers below, before any logits_norm.

    load_balancing_loss  sum_i eta_i f_i P_i, eta = 1 for true experts and tau for others; f_i the share of tokens that
                         chose i (they sum to k), P_i the mean probability

    With capacity_factor = gamma above 0, in training a true expert has gamma tau T / (tau N_F + N_Z) slots and every
    other gamma T / (tau N_F + N_Z), rounded up; overflow is dropped by the rule `drop` and not renormalised. The paper
    prints T, the tokens; with top-2 that is about half of the pairs. Which it ran is not known: capacity_of=pair takes
    T k.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        keys = jax.random.split(key, 5)
        super().__init__(config, site, keys[0])
        o: Settings = self.options
        self.k = o.experts_per_token
        choices, std, stack = self.choices, site.std, site.stack

        def matrix(key: jax.Array, *shape: int, role: Role = "matrix") -> nnx.Param:
            return normal_param(key, shape, (None,) * len(shape), std, stack, role=role)

        if o.gate == "mlp":
            self.weight = matrix(keys[0], site.width, EXPANSION * choices)
        self.second = matrix(keys[1], EXPANSION * choices, choices) if o.gate == "mlp" else None
        self.residual = matrix(keys[2], choices, choices) if o.residual else None
        self.constant_gate = matrix(keys[3], o.constant, site.width, 2) if o.constant else None
        self.constant = matrix(keys[4], o.constant, site.width, role="vector") if o.constant else None
        self.reads_previous = o.residual
        self.input_scale = float(self.k) if o.input_scale and not o.mixtral_gating else 1.0

    def logits(self, x: jax.Array) -> jax.Array:
        logits = super().logits(x)
        return logits if self.second is None else scored(jnp.tanh(logits), self.second[...])

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(x)
        if self.residual is not None and context.previous is not None:
            logits = logits + scored(context.previous, self.residual[...])
        scores = logits * (o.logits_norm / deviation(logits)) if o.logits_norm else logits
        index = top_choices(context.among(scores), self.k)
        counted = jnp.ones(index.shape, bool) if o.mixtral_gating else index < self.choices - o.zero
        weights = softmax_over(jnp.take_along_axis(scores, index, axis=-1), counted)
        wanted = context.wanted(index, present_pairs(index, context.present))
        kept, bounds = self._within_capacity(index, weights, wanted, context)
        zero = zero_weights(index, weights, kept, c.experts, self.zero_experts)
        dispatch = by_token(index, weights, kept & (index < c.experts), c.experts, zero_weights=zero, **bounds)
        load = claims(index, wanted, self.choices).sum(0)
        losses = {"load_balancing_loss": self._balance(jax.nn.softmax(scores, axis=-1), load, context.present)}
        losses["router_z_loss"] = z_loss(logits, context.present)
        stats = statistics(dispatch, logits, load, context.present)
        stats["zero_dropped"] = (wanted & ~kept & (index >= c.experts)).sum().astype(jnp.float32)
        return Routing(dispatch, losses, stats, {}, logits, mask_of(index, wanted, self.choices))

    def zero_output(self, x: jax.Array, weights: jax.Array) -> jax.Array | None:
        o = self.options
        if not self.zero_experts:
            return None
        x = x.astype(jnp.float32) * self.input_scale
        passed = weights[..., o.constant : o.constant + o.copy].sum(-1)
        if self.constant is None or self.constant_gate is None:
            return x * passed[..., None]
        mix = jax.nn.softmax(jnp.einsum("bsd,jdc->bsjc", x, self.constant_gate[...], precision=HIGHEST), axis=-1)
        mix = mix * weights[..., : o.constant, None]
        passed = passed + mix[..., 0].sum(-1)
        return x * passed[..., None] + jnp.einsum("bsj,jd->bsd", mix[..., 1], self.constant[...], precision=HIGHEST)

    def no_gradient(self) -> str:
        o = self.options
        if self.k > 1 and (o.mixtral_gating or self.choices - o.zero > 1):
            return ""
        return (
            f"with router.experts_per_token={self.k} a normalised weight is always 1 and the router learns nothing: "
            "take at least 2 of at least 2 experts that are not zero"
        )

    def _balance(self, probabilities: jax.Array, load: jax.Array, present: jax.Array | None) -> Summed:
        eta = jnp.where(jnp.arange(self.choices) < self.config.experts, 1.0, self.options.tau)
        return Summed(choice_sums(probabilities, eta * load, present), Product(1.0))

    def _within_capacity(
        self, index: jax.Array, weights: jax.Array, wanted: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, int]]:
        """(pairs bool[batch, seq, k] that find a slot, bounds of the Dispatch)."""
        c, o = self.config, self.options
        if not o.capacity_factor or not context.training or context.selection == "threshold":
            return wanted, {}
        batch, seq, k = index.shape
        whole = o.capacity_group == "batch"
        tokens, share = batch * seq if whole else seq, o.true_share(c)
        each = k if o.capacity_of == "pair" else 1
        room = slots(tokens, each, 1, o.capacity_factor * share)
        bounds = {"most_per_batch" if whole else "most_per_sequence": room}
        true = index < c.experts
        if context.kept is not None:  # none of zero experts, which take no room
            own = jnp.take_along_axis(context.kept, jnp.minimum(index, c.experts - 1), axis=-1)
            return wanted & jnp.where(true, own, True), bounds
        within = lambda pairs, room: keeping(o, index, weights, pairs, room, self.choices)  # noqa: E731
        zero_room = slots(tokens, each, 1, o.capacity_factor * share / o.tau)
        kept = within(wanted & true, room) | within(wanted & ~true, zero_room)
        return kept, bounds


def deviation(logits: jax.Array) -> jax.Array:
    """Standard deviation f32[..., 1] of the last axis, with ddof 1; its gradient is finite where all are equal."""
    return jnp.sqrt(jnp.var(logits, axis=-1, ddof=1, keepdims=True) + 1e-20)
