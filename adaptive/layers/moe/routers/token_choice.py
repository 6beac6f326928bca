"""Token choice: every token takes its top-k experts (Shazeer et al. 2017; GShard; Switch; Mixtral; DeepSeek-V3)."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.linear import scored
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.choosing import check_shared, jittered, limited, mask_of, present_pairs, shared_in_experts
from adaptive.layers.moe.settings import Limited, MoESettings
from adaptive.layers.site import Site, normal_param, param
from adaptive.routing import scale
from adaptive.routing.balance import Form, balancing_loss, claims, importance_and_load
from adaptive.routing.capacity import Rule, slots
from adaptive.routing.dispatch import by_token
from adaptive.routing.losses import Product, updated_bias
from adaptive.routing.masked import choice_sums
from adaptive.routing.select import top_choices
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Limited):
    """Mixtral, Qwen3-MoE: the defaults. OLMoE, Switch: normalise=false. Megatron: score=logits. DeepSeek-V3:
    score=sigmoid, bias=true, groups=8, kept_groups=4, route_scale=2.5. EC-DLM's loss-free token choice: score=logits,
    normalise=false, bias=true."""

    score: Literal["softmax", "logits", "sigmoid", "cosine"] = "softmax"  # logits: chosen by them, weights a softmax
    normalise: bool = True  # divide the k weights by their sum; of logits that is the softmax over the k
    route_scale: float = 1.0  # multiplies the weights
    balance: Form = "switch"
    bias: bool = False  # loss-free balancing: a bias on the choice alone, moved after every step
    bias_rate: float = ranged(0.001, least=0)
    groups: int = ranged(1, least=1)  # contiguous groups of experts, of which a token may use `kept_groups`
    kept_groups: int = ranged(1, least=1)
    group_score: Literal["top2", "max"] = "top2"  # DeepSeek-V3, DeepSeek-V2
    jitter: float = ranged(0.0, least=0, most=1)  # training multiplies the router's input by U(1 - jitter, 1 + jitter)
    noise: float = ranged(0.0, least=0)  # training adds noise / experts * N(0, 1) to the logits (V-MoE, Tutel)
    importance_coefficient: float = ranged(0.0, least=0)  # of the loss of importance and load; needs noise
    load_of: Literal["logits", "scores"] = "logits"  # what it compares: V-MoE, Tutel as released
    cosine_size: int = ranged(256, least=1)  # width of the cosine gate's projection
    scale_to_shared: bool = False  # one factor for normalised weights: routed and shared experts of the same scale
    capacity_rule: Rule = "megatron"  # slots of an expert under a capacity_factor; see adaptive.routing.capacity
    least_slots: int = ranged(1, least=1)  # Flaxformer: 4

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        here, experts, k = f"{at}.router", config.experts, self.experts_per_token
        if experts % self.groups or self.kept_groups > self.groups:
            raise RecipeError(
                f"{here}.groups={self.groups} and {here}.kept_groups={self.kept_groups} do not fit "
                f"{at}.experts={experts}: groups must divide them and kept_groups be at most groups"
            )
        reach = self.kept_groups * (experts // self.groups)
        if reach < k:
            raise RecipeError(f"{here}.kept_groups={self.kept_groups}: leaves {reach} experts for a top-{k}")
        if self.group_score == "top2" and self.groups > 1 and experts // self.groups < 2:
            raise RecipeError(f"{here}.group_score=top2: needs groups of at least 2 experts; use max")
        if self.importance_coefficient and (self.noise <= 0 or experts < 2):
            raise RecipeError(
                f"{here}.importance_coefficient={self.importance_coefficient:g}: compares the experts' loads under "
                f"noise: it needs {here}.noise above 0 (Tutel: 1) and at least 2 experts"
            )
        if self.scale_to_shared:
            check_shared(config, at)

    def against_starving(self, at: str) -> str:
        return f"{'' if self.bias else f'set {at}.router.bias=true, '}{super().against_starving(at)}"

    def coefficients(self) -> dict[str, float]:
        return super().coefficients() | {"importance_loss": self.importance_coefficient}

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.balance == "flaxformer" and self.balance_coefficient:  # over groups
            found.pop("capacity_group", None)
        if not self.capacity_factor:
            found |= dict.fromkeys(("capacity_rule", "least_slots"), "capacity_factor=0 drops nothing")
        if not self.bias:
            found["bias_rate"] = "bias=false"
        if self.groups == self.kept_groups:
            found["group_score"] = "all groups are kept"
        if not self.importance_coefficient:
            found["load_of"] = "importance_coefficient=0"
        if self.score != "cosine":
            found["cosine_size"] = f"score={self.score} has no projection"
        if self.balance != "hf" and not self.balance_coefficient:
            found["balance"] = "balance_coefficient=0"
        return found

    def slots(self, config: MoESettings, tokens: Any) -> Any:
        k, rule = self.experts_per_token, self.capacity_rule
        return slots(tokens, k, config.choices, self.capacity_factor, rule, self.least_slots)

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        wanted = super().pairs(config, tokens, site)
        return min(wanted, config.experts * self.slots(config, int(tokens))) if self.capacity_factor else wanted

    def matrices(self, config: MoESettings, width: int) -> int:
        if self.score != "cosine":
            return super().matrices(config, width)
        return self.cosine_size * (width + config.experts)

    def vectors(self, config: MoESettings, width: int) -> int:
        return int(self.score == "cosine")


class Router(ExpertRouter):
    """scores -> top-k.

    weight       f32[width, experts] (cosine: f32[cosine_size, experts])
    projection   f32[width, cosine_size], temperature f32[]: of the cosine gate alone (Tutel)
    bias         f32[experts], a buffer of loss-free balancing (arXiv 2408.15664)

    Weights are read from the scores without the bias: with score=logits they are the softmax over the k chosen logits,
    or, with normalise=false, what the softmax over all gives those k. With capacity_factor above 0 each expert has
    slots for as many of the real tokens of a sequence or of the batch as `capacity_rule` says, and pairs beyond are
    dropped by the rule `drop`; "threshold" selection (generation) drops none, because who else is in the sequence must
    not matter. Losses and the bias count pairs before dropping. importance_loss is that of importance and load.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        matrix, projection = jax.random.split(key)
        super().__init__(config, site, matrix)
        o: Settings = self.options
        self.k = o.experts_per_token
        cosine = o.score == "cosine"
        if cosine:
            self.weight = normal_param(matrix, (o.cosine_size, config.experts), (None, None), 0.01, site.stack)
        shape = (site.width, o.cosine_size)
        self.projection = normal_param(projection, shape, (None, None), site.std, site.stack) if cosine else None
        temperature = jnp.full(site.stack, math.log(1 / 0.07))
        self.temperature = param(temperature, (), stack=site.stack, role="scale") if cosine else None
        self.bias = site.buffer(jnp.zeros(config.experts)) if o.bias else None
        self.multiplier = 1.0
        if o.scale_to_shared:
            self.multiplier = scale.token_choice_factor(
                config.experts, self.k, shared_in_experts(config), o.score == "sigmoid"
            )

    def logits(self, x: jax.Array) -> jax.Array:
        if self.projection is None or self.temperature is None:
            return super().logits(x)
        unit = lambda a, axis: a / jnp.maximum(jnp.linalg.norm(a, axis=axis, keepdims=True), 1e-12)  # noqa: E731
        projected = scored(x.astype(jnp.float32), self.projection[...])
        cosine = scored(unit(projected, -1), unit(self.weight[...], 0))
        return cosine * jnp.exp(jnp.minimum(self.temperature[...], math.log(100.0)))

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o, k = self.config, self.options, self.k
        clean = self.logits(jittered(x, o.jitter, context))
        logits = clean + self._noise(clean, context)
        softmax = jax.nn.softmax(logits, axis=-1)
        scores = jax.nn.sigmoid(logits) if o.score == "sigmoid" else softmax
        choice = logits if o.score == "logits" else scores
        if self.bias is not None:
            choice = choice + self.bias[...]
        index = top_choices(context.among(limited_to_groups(choice, o.groups, o.kept_groups, o.group_score)), k)
        if o.score == "logits" and o.normalise:
            weights = jax.nn.softmax(jnp.take_along_axis(logits, index, axis=-1), axis=-1)
        else:
            weights = jnp.take_along_axis(scores, index, axis=-1)
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) if o.normalise else weights
        weights = weights * (o.route_scale * self.multiplier)
        wanted = context.wanted(index, present_pairs(index, context.present))
        best = jnp.take_along_axis(scores, index, axis=-1).max(-1)
        valid, bounds = limited(c, index, weights, wanted, context, best)
        dispatch = by_token(index, weights, valid, c.experts, **bounds)
        load = claims(index, wanted, c.experts)
        own = o.score == "sigmoid" and o.balance == "sequence"  # DeepSeek-V3
        normalised = scores / (scores.sum(-1, keepdims=True) + 1e-20) if own else softmax
        losses, parts = balance(c, normalised, index, wanted, context)
        losses["router_z_loss"] = z_loss(clean, context.present)
        if o.noise and c.experts > 1:
            p = jax.nn.softmax(clean, axis=-1)
            values = clean if o.load_of == "logits" else p
            losses["importance_loss"] = importance_and_load(p, logits, values, k, o.noise, context.present)
        stats = statistics(dispatch, clean, load.sum(0), context.present)
        return Routing(dispatch, losses, stats, parts, clean, mask_of(index, wanted, c.experts))

    def _noise(self, logits: jax.Array, context: Context) -> jax.Array | float:
        if not self.options.noise:
            return 0.0
        # The key itself is the jitter's.
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, 1), logits.shape, logits.dtype)  # noqa: E731
        noise = context.drawn(context.noise.logits, draw)
        return 0.0 if noise is None else self.options.noise / self.config.experts * noise

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        if self.options.balance != "hf":
            return {}
        # Hugging Face concatenates the tokens of all layers before the means.
        sums = {name.removeprefix("hf_"): part.sum(0) for name, part in parts.items()}
        return {"load_balancing_loss": Summed(sums, Product(self.config.experts))}

    def selects_alike(self) -> bool:
        return not self.options.capacity_factor

    def no_gradient(self) -> str:
        o: Settings = self.options
        if self.config.experts == 1 and o.score != "sigmoid":
            return "the softmax over experts=1 is always 1 and the router learns nothing"
        if self.k > 1 or not o.normalise:
            return ""
        return (
            "with router.experts_per_token=1 a normalised weight is always 1 and the router learns nothing: set "
            "router.normalise=false"
        )

    def update(self, stats: dict[str, jax.Array]) -> None:
        if self.bias is not None:
            rate = self.options.bias_rate
            move = jnp.vectorize(lambda b, n: updated_bias(b, n, rate), signature="(e),(e)->(e)")
            self.bias[...] = move(self.bias[...], stats["claimed"])


def limited_to_groups(choice: jax.Array, groups: int, kept: int, score: Literal["top2", "max"]) -> jax.Array:
    """`choice` f32[batch, seq, experts] with all experts but those of the best `kept` groups at -inf (DeepSeek)."""
    if groups == kept:
        return choice
    split = choice.reshape(*choice.shape[:-1], groups, -1)
    best = split.max(-1)
    if score == "top2":
        rest = jnp.where(jnp.arange(split.shape[-1]) == split.argmax(-1)[..., None], -jnp.inf, split)
        best = best + rest.max(-1)
    chosen = (top_choices(best, kept)[..., None] == jnp.arange(groups)).any(-2)
    return jnp.where(chosen[..., None], split, -jnp.inf).reshape(choice.shape)


def balance(
    config: MoESettings, probabilities: jax.Array, index: jax.Array, wanted: jax.Array, context: Context
) -> tuple[dict[str, Summed], dict[str, jax.Array]]:
    """(losses, parts) of the balancing loss; the form "hf" is put together over all layers."""
    o = config.router
    assert isinstance(o, Settings)
    if o.balance == "hf":  # Hugging Face reports it whether or not it is trained
        sums = choice_sums(probabilities, claims(index, wanted, config.experts).sum(0), context.present)
        return {}, {f"hf_{name}": total for name, total in sums.items()}
    whole = o.balance == "flaxformer" and o.capacity_group == "batch"  # its mean over one group, the form of "hf"
    form: Form = "hf" if whole else o.balance
    return {"load_balancing_loss": balancing_loss(probabilities, index, wanted, context.present, form)}, {}
