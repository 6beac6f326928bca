"""Token choice: every token takes its top-k experts (Shazeer et al. 2017; GShard; Switch; Mixtral; DeepSeek-V3)."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.linear import normal_param
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe_config import MoEConfig
from adaptive.layers.site import Site
from adaptive.routing import scale
from adaptive.routing.balance import Form, balancing_loss, claims, importance_and_load
from adaptive.routing.capacity import Rule, keep_within, slots
from adaptive.routing.dispatch import by_token
from adaptive.routing.losses import updated_bias
from adaptive.routing.select import top_choices


@dataclasses.dataclass(frozen=True)
class Options:
    """Mixtral, Qwen3-MoE: the defaults. OLMoE, Switch: normalise=false. Megatron: score=logits. DeepSeek-V3:
    score=sigmoid,bias=true,groups=8,kept_groups=4,route_scale=2.5."""

    score: Literal["softmax", "logits", "sigmoid", "cosine"] = "softmax"  # logits: softmax over the k that were chosen
    normalise: bool = True  # divide the k weights by their sum
    route_scale: float = 1.0  # multiplies the weights
    balance: Form = "switch"
    bias: bool = False  # loss-free balancing: a bias on the choice alone, moved after every step
    bias_rate: float = 0.001
    groups: int = 1  # contiguous groups of experts, of which a token may use `kept_groups`
    kept_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"  # DeepSeek-V3, DeepSeek-V2
    jitter: float = 0.0  # training multiplies the router's input by U(1 - jitter, 1 + jitter)
    noise: float = 0.0  # training adds noise / experts * N(0, 1) to the logits (V-MoE, Tutel)
    importance_coefficient: float = 0.0  # of the loss of importance and load; needs noise
    load_of: Literal["logits", "scores"] = "logits"  # what it compares: V-MoE, Tutel as released
    cosine_size: int = 256  # width of the cosine gate's projection
    scale_to_shared: bool = False  # one factor for normalised weights: routed and shared experts of the same scale
    capacity_rule: Rule = "megatron"  # slots of an expert under a capacity_factor; see adaptive.routing.capacity
    least_slots: int = 1  # Flaxformer: 4


class Router(ExpertRouter):
    """scores -> top-k.

    weight       f32[width, experts] (cosine: f32[cosine_size, experts])
    projection   f32[width, cosine_size], temperature f32[]: of the cosine gate alone (Tutel)
    bias         f32[experts], a buffer of loss-free balancing (arXiv 2408.15664)

    Weights are read from the scores without the bias. With capacity_factor above 0 each expert has slots for as many
    of the real tokens of a sequence or of the batch as `capacity_rule` says, and pairs beyond are dropped by the rule
    `drop`; "threshold" selection (generation) drops none, because who else is in the sequence must not matter. Losses
    and the bias count pairs before dropping. importance_loss is that of importance and load.
    """

    Options = Options

    def __init__(self, config: MoEConfig, site: Site, key: jax.Array):
        matrix, projection = jax.random.split(key)
        super().__init__(config, site, matrix)
        o: Options = self.options
        self.k = whole_k(config)
        _check_groups(o, config, self.k)
        _check_noise(o, config)
        if o.least_slots < 1 or o.cosine_size < 1:
            raise RecipeError("model.moe.options: least_slots and cosine_size must be at least 1")
        cosine = o.score == "cosine"
        if cosine:
            self.weight = normal_param(matrix, (o.cosine_size, config.experts), (None, None), 0.01, site.stack)
        shape = (site.width, o.cosine_size)
        self.projection = normal_param(projection, shape, (None, None), site.std, site.stack) if cosine else None
        self.temperature = _log_temperature(site) if cosine else None
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
        projected = jnp.matmul(x.astype(jnp.float32), self.projection[...], precision=jax.lax.Precision.HIGHEST)
        cosine = jnp.matmul(unit(projected, -1), unit(self.weight[...], 0), precision=jax.lax.Precision.HIGHEST)
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
        index = top_choices(limited_to_groups(choice, o.groups, o.kept_groups, o.group_score), k)
        weights = jnp.take_along_axis(logits if o.score == "logits" else scores, index, axis=-1)
        if o.score == "logits":
            weights = jax.nn.softmax(weights, axis=-1)
        elif o.normalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        weights = weights * (o.route_scale * self.multiplier)
        wanted = present_pairs(index, context.present)
        best = jnp.take_along_axis(scores, index, axis=-1).max(-1)
        valid, bounds = limited(
            c, index, weights, wanted, context, best=best, rule=o.capacity_rule, least=o.least_slots
        )
        dispatch = by_token(index, weights, valid, c.experts, **bounds)
        load = claims(index, wanted, c.experts)
        own = o.score == "sigmoid" and o.balance == "sequence"  # DeepSeek-V3
        normalised = scores / (scores.sum(-1, keepdims=True) + 1e-20) if own else softmax
        losses, parts = balance(c, o.balance, normalised, index, wanted, context)
        if c.z_coefficient:
            losses["router_z_loss"] = z_loss(clean, context.present)
        if o.importance_coefficient:
            p = jax.nn.softmax(clean, axis=-1)
            values = clean if o.load_of == "logits" else p
            losses["importance_loss"] = importance_and_load(p, logits, values, k, o.noise, context.present)
        return Routing(dispatch, losses, statistics(dispatch, clean, load.sum(0), context.present), parts, clean)

    def _noise(self, logits: jax.Array, context: Context) -> jax.Array | float:
        if not self.options.noise or not context.training or context.key is None:
            return 0.0
        key = jax.random.fold_in(context.key, 1)  # the key itself is the jitter's
        return self.options.noise / self.config.experts * jax.random.normal(key, logits.shape)

    def coefficients(self) -> dict[str, float]:
        return super().coefficients() | {"importance_loss": self.options.importance_coefficient}

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if self.options.balance != "hf":
            return {}
        # Hugging Face concatenates the tokens of all layers before the means.
        load, probability = parts["hf_load"].mean(0), parts["hf_probability"].mean(0)
        return {"load_balancing_loss": self.config.experts * jnp.sum(load * probability)}

    def pairs(self, tokens: float) -> float:
        return min(super().pairs(tokens), self.config.experts * self._slots(int(tokens)))

    def router_flops(self, tokens: float) -> float:
        if self.projection is None:
            return super().router_flops(tokens)
        return 2.0 * tokens * self.options.cosine_size * (self.site.width + self.config.experts)

    def _slots(self, tokens: int) -> int:
        c, o = self.config, self.options
        if not c.capacity_factor:
            return tokens
        return slots(tokens, self.k, c.experts, c.capacity_factor, o.capacity_rule, o.least_slots)

    def no_gradient(self) -> str:
        o: Options = self.options
        if self.config.experts == 1 and o.score in ("softmax", "cosine"):
            return "the softmax over model.moe.experts=1 is always 1 and the router learns nothing"
        if self.k > 1 or not (o.normalise or o.score == "logits"):
            return ""
        return (
            "with model.moe.experts_per_token=1 a normalised weight is always 1 and the router learns nothing: set "
            "model.moe.options=score=softmax,normalise=false"
        )

    def update(self, stats: dict[str, jax.Array]) -> None:
        if self.bias is not None:
            rate = self.options.bias_rate
            move = jnp.vectorize(lambda b, n: updated_bias(b, n, rate), signature="(e),(e)->(e)")
            self.bias[...] = move(self.bias[...], stats["claimed"])


def shared_in_experts(config: MoEConfig) -> float:
    """Width of the shared feed-forward in experts; RecipeError where there is none to scale to."""
    if not config.shared_size or not config.expert_size:
        raise RecipeError(
            "model.moe.options: scale_to_shared needs model.moe.shared_size and model.moe.expert_size above 0"
        )
    return config.shared_size / config.expert_size


def whole_k(config: MoEConfig) -> int:
    """Experts per token; RecipeError unless their number is whole."""
    k = config.experts_per_token
    if k != int(k):
        raise RecipeError(f"model.moe.experts_per_token={k:g}: {config.router} takes a whole number of experts")
    return int(k)


def _check_noise(o: Options, config: MoEConfig) -> None:
    if o.importance_coefficient and (o.noise <= 0 or config.experts < 2):
        raise RecipeError(
            "model.moe.options: importance_coefficient compares the experts' loads under noise: it needs noise above 0 "
            "(Tutel: 1) and at least 2 experts"
        )
    if o.noise < 0 or not 0 <= o.jitter <= 1:
        raise RecipeError(
            f"model.moe.options: noise={o.noise:g}, jitter={o.jitter:g}: noise must be at least 0, jitter within 0 to 1"
        )


def _check_groups(o: Options, config: MoEConfig, k: int) -> None:
    if o.groups < 1 or config.experts % o.groups or not 1 <= o.kept_groups <= o.groups:
        raise RecipeError(
            f"model.moe.options: groups={o.groups}, kept_groups={o.kept_groups} does not fit {config.experts} experts: "
            "groups must divide them and kept_groups be at most groups"
        )
    reach = o.kept_groups * (config.experts // o.groups)
    if reach < k:
        raise RecipeError(f"model.moe.options: kept_groups={o.kept_groups} leave {reach} experts for a top-{k}")
    if o.group_score == "top2" and o.groups > 1 and config.experts // o.groups < 2:
        raise RecipeError("model.moe.options: group_score=top2 needs groups of at least 2 experts; use max")


def _log_temperature(site: Site) -> nnx.Param:
    return nnx.Param(jnp.full(site.stack, math.log(1 / 0.07)), axes=(None,) * len(site.stack))


def jittered(x: jax.Array, jitter: float, context: Context) -> jax.Array:
    """x times uniform noise in training."""
    if not jitter or not context.training or context.key is None:
        return x
    return x * jax.random.uniform(context.key, x.shape, x.dtype, 1 - jitter, 1 + jitter)


def present_pairs(index: jax.Array, present: jax.Array | None) -> jax.Array:
    """bool, the shape of index [batch, seq, k]: pairs of tokens that exist."""
    everyone = jnp.ones(index.shape, bool)
    return everyone if present is None else everyone & present[..., None]


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


def limited(
    config: MoEConfig,
    index: jax.Array,
    weights: jax.Array,
    wanted: jax.Array,
    context: Context,
    zero_experts: int = 0,
    *,
    best: jax.Array | None = None,
    rule: Rule = "megatron",
    least: int = 1,
) -> tuple[jax.Array, dict[str, Any]]:
    """(pairs bool[batch, seq, k] that find a slot, bounds of the Dispatch) under the configuration's capacity.

    Zero experts take their share of a balanced load; their pairs must not be among the wanted. best f32[batch, seq]:
    what drop=batch sorts tokens by; None: their largest weight. Slots are counted for the tokens that are present.
    """
    if not config.capacity_factor or context.selection == "threshold":
        return wanted, {}
    batch, seq, _ = index.shape
    whole = config.capacity_group == "batch"
    tokens = batch * seq if whole else seq
    choices = config.experts + zero_experts
    slots_for = lambda n: slots(n, config.experts_per_token, choices, config.capacity_factor, rule, least)  # noqa: E731
    group = (lambda a: a.reshape(1, -1, *a.shape[2:])) if whole else (lambda a: a)
    most = room = slots_for(tokens)
    if context.present is not None:
        room = slots_for(group(context.present).sum(-1, dtype=jnp.int32))
    kept = keep_within(
        group(index),
        group(weights),
        group(wanted),
        room,
        config.experts,
        config.drop,
        None if best is None else group(best),
    )
    return kept.reshape(wanted.shape), {"most_per_batch" if whole else "most_per_sequence": most}


def balance(
    config: MoEConfig, form: Form, probabilities: jax.Array, index: jax.Array, wanted: jax.Array, context: Context
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(losses, parts) of the balancing loss; the form "hf" is put together over all layers."""
    if not config.balance_coefficient and form != "hf":  # Hugging Face reports it whether or not it is trained
        return {}, {}
    if form != "hf":
        return {"load_balancing_loss": balancing_loss(probabilities, index, wanted, context.present, form)}, {}
    where = jnp.ones(index.shape[:2]) if context.present is None else context.present.astype(jnp.float32)
    tokens = jnp.maximum(where.sum(), 1.0)
    parts = {
        "hf_load": claims(index, wanted, config.experts).sum(0) / tokens,
        "hf_probability": (probabilities * where[..., None]).sum((0, 1)) / tokens,
    }
    return {}, parts
