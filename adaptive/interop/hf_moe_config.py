"""config.json of the transformers library's Mixtral, OLMoE and Qwen3-MoE, read as ours.

A field that is left out has the library's default for the kind. Fields that cannot change what the model computes are
ignored; a field that would, in a way this package has no counterpart for, is refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from adaptive.errors import RecipeError
from adaptive.interop.fields import Fields
from adaptive.interop.llama_family import padding_token, patterned
from adaptive.layers import stack
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards import FeedForward, dense, experts
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.moe.routers import token_choice
from adaptive.models import language_model
from adaptive.models.bodies import plain

Kind = Literal["mixtral", "olmoe", "qwen3_moe"]

# Defaults of the library's configuration classes (transformers 5); num_key_value_heads null is num_attention_heads,
# head_dim null is hidden_size / num_attention_heads.
DEFAULTS: dict[Kind, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
        "pad_token_id": None,
    },
    "olmoe": {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": None, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01, "pad_token_id": 1,
    },
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001,
        "moe_intermediate_size": 768, "decoder_sparse_step": 1, "pad_token_id": None,
    },
}  # fmt: skip
QK_NORMS: dict[Kind, Literal["none", "head", "full"]] = {"mixtral": "none", "olmoe": "full", "qwen3_moe": "head"}
KINDS: tuple[Kind, ...] = tuple(QK_NORMS)
MOST_LAYERS = 10_000  # each is listed before any tensor is looked at


def config_from_transformers(kind: Kind, config: Mapping[str, Any]) -> language_model.Settings:
    """The model that a config.json of this kind describes; raises RecipeError, naming the field, where there is none.

    The coefficient of the balancing loss is router_aux_loss_coef where output_router_logits is set and 0 otherwise, as
    the library adds it to its loss. max_window_layers changes nothing: the library's window holds in every layer.
    """
    fields = _Fields(kind, config)
    fields.refuse_what_has_no_counterpart()
    ours = language_model.Settings(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        body=plain.Settings(_stack(fields)),
        norm_eps=fields.number("rms_norm_eps"),
        padding_token=padding_token(fields),
        tie_embeddings=fields.boolean("tie_word_embeddings"),
    )
    ours.validate()
    return ours


class _Fields(Fields):
    """A config.json with the defaults of its kind. Numbers out of range are refused by the settings they become."""

    kind: Kind

    def __init__(self, kind: Kind, given: Mapping[str, Any]):
        super().__init__(kind, given, DEFAULTS[kind])

    def integer(self, name: str, *, least: int = -(2**31), most: int = 2**31 - 1) -> int:
        return super().integer(name, least=least, most=most)

    def refuse_what_has_no_counterpart(self) -> None:
        """Raises RecipeError for values that would change the numbers in a way that is not built here."""
        if self.given("model_type") not in (None, self.kind):
            hint = f"; that is kind {self.given('model_type')!r}" if self.given("model_type") in KINDS else ""
            raise self.wrong("model_type", f"this kind reads {self.kind!r} alone{hint}")
        if self.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.wrong("hidden_act", "is not supported, only 'silu'")
        if self.given("quantization_config") is not None:
            raise self.wrong("quantization_config", "is not supported; give the tensors in a float dtype, without it")
        for name in ("attention_dropout", "router_jitter_noise"):
            if self.given(name):
                raise self.wrong(
                    name, "has no counterpart in training here; set it to 0.0, which leaves inference as it is"
                )


def _stack(fields: _Fields) -> stack.Settings:
    """The layers, as the shortest pattern that repeats."""
    attention, feed_forwards = _attention(fields), _feed_forwards(fields)
    return patterned([Block(attention, feed_forward) for feed_forward in feed_forwards])


def _attention(fields: _Fields) -> Attention:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer_or_none("head_dim") or width // max(heads, 1)
    if fields.kind == "olmoe" and heads * head_dim != width:
        raise RecipeError(
            f"official olmoe: its query norm is as wide as the model, so num_attention_heads={heads} times "
            f"head_dim={head_dim} must be hidden_size={width}"
        )
    return Attention(
        heads=heads,
        kv_heads=fields.integer_or_none("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(fields),
        window=_window(fields),
        bias="all" if fields.kind != "mixtral" and fields.boolean("attention_bias") else "none",
        qk_norm=QK_NORMS[fields.kind],
        clip_qkv=_clip(fields) if fields.kind == "olmoe" else 0.0,
    )


def _feed_forwards(fields: _Fields) -> list[FeedForward]:
    """That of each layer."""
    layers = fields.integer("num_hidden_layers")
    if not 1 <= layers <= MOST_LAYERS:
        raise fields.wrong("num_hidden_layers", f"must be at least 1 and at most {MOST_LAYERS}")
    plain_one, routed, only = (
        dense.Settings(fields.integer("intermediate_size")),
        _experts(fields),
        _dense_layers(fields),
    )
    return [plain_one if routed is None or only(i) else routed for i in range(layers)]


def _rope_theta(fields: _Fields) -> float:
    """The base of the rotary embedding; of the two dicts that may hold it the older, rope_scaling, comes first."""
    name = "rope_scaling" if fields.given("rope_scaling") else "rope_parameters"
    rope = fields.given(name) or {}
    if not isinstance(rope, Mapping):
        raise fields.wrong(name, "must be a dict or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise fields.wrong(name, "settings per layer type are not supported, only one rotary embedding for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", None):
        raise RecipeError(
            f"official {fields.kind}: {name}.rope_type={kind!r} is not supported, only 'default': without it the model "
            "would be another one"
        )
    theta = rope.get("rope_theta")
    theta = fields.number("rope_theta") if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise RecipeError(f"official {fields.kind}: rope_theta={theta!r} must be a number above 0")
    return float(theta)


def _window(fields: _Fields) -> int:
    """Positions that a query sees; 0: all. OLMoE has no window, Qwen's needs use_sliding_window."""
    if fields.kind == "olmoe" or (fields.kind == "qwen3_moe" and not fields.boolean("use_sliding_window")):
        return 0
    window = fields.integer_or_none("sliding_window")
    if window is not None and window < 1:
        raise fields.wrong("sliding_window", "must be at least 1, or null for none")
    return window or 0


def _clip(fields: _Fields) -> float:
    if fields.given("clip_qkv") is None:
        return 0.0
    clip = fields.number("clip_qkv")
    if clip <= 0:
        raise fields.wrong("clip_qkv", "must be above 0, or null for none")
    return clip


def _experts(fields: _Fields) -> experts.Settings | None:
    """The experts of the layers that have them; None: no layer has."""
    count, qwen = _count(fields), fields.kind == "qwen3_moe"
    if qwen and count == 0:
        return None
    return experts.Settings(
        router=token_choice.Settings(
            experts_per_token=fields.integer("num_experts_per_tok"),
            balance_coefficient=fields.number("router_aux_loss_coef")
            if fields.boolean("output_router_logits")
            else 0.0,
            normalise=fields.kind == "mixtral" or fields.boolean("norm_topk_prob"),
            balance="hf",
        ),
        experts=count,
        expert_size=fields.integer("moe_intermediate_size" if qwen else "intermediate_size"),
    )


def _count(fields: _Fields) -> int:
    """Experts, which the library calls num_experts or num_local_experts."""
    names = [name for name in ("num_local_experts", "num_experts") if fields.given(name) is not None]
    if len(names) == 2 and fields.given(names[0]) != fields.given(names[1]):
        raise RecipeError(
            f"official {fields.kind}: num_local_experts={fields.given('num_local_experts')!r} and "
            f"num_experts={fields.given('num_experts')!r} are two names of one setting; give one"
        )
    return fields.integer(names[0] if names else "num_experts")


def _dense_layers(fields: _Fields) -> Callable[[int], bool]:
    """Which layers' feed-forward is dense; Qwen alone has such."""
    if fields.kind != "qwen3_moe":
        return lambda _: False
    step, only = fields.integer("decoder_sparse_step"), fields.given("mlp_only_layers") or ()
    if step < 1:
        raise fields.wrong("decoder_sparse_step", "must be at least 1: every step-th layer has experts")
    if isinstance(only, str) or not all(isinstance(i, int) and not isinstance(i, bool) for i in only):
        raise fields.wrong("mlp_only_layers", "must be a list of layer numbers, from 0")
    return lambda layer: layer in only or bool((layer + 1) % step)


def config_to_transformers(kind: Kind, architecture: str, settings: language_model.Settings) -> dict[str, Any]:
    """config.json of a model that this kind has."""
    body = settings.body
    assert isinstance(body, plain.Settings)
    pattern = [block for block in body.stack.blocks for _ in range(block.repeat)] * body.stack.repeats
    attention = pattern[0].mixer
    routed = [block.feed_forward for block in pattern if isinstance(block.feed_forward, experts.Settings)]
    dense_ones = [block.feed_forward for block in pattern if isinstance(block.feed_forward, dense.Settings)]
    assert isinstance(attention, Attention)
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.width,
        "num_hidden_layers": len(pattern),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": attention.rope_theta,
        "tie_word_embeddings": settings.tie_embeddings,
        "pad_token_id": settings.padding_token if settings.padding_token >= 0 else None,
        "attention_bias": attention.bias == "all",
        "intermediate_size": dense_ones[0].hidden if dense_ones else DEFAULTS[kind]["intermediate_size"],
    }
    if kind != "olmoe":
        fields |= {"sliding_window": attention.window or None, "use_sliding_window": bool(attention.window)}
    elif attention.clip_qkv:
        fields["clip_qkv"] = attention.clip_qkv
    if not routed:
        return fields | {"num_experts": 0}
    router = routed[0].router
    assert isinstance(router, token_choice.Settings)
    fields |= {
        "num_local_experts" if kind == "mixtral" else "num_experts": routed[0].experts,
        "num_experts_per_tok": router.experts_per_token,
        "norm_topk_prob": router.normalise,
        "router_aux_loss_coef": router.balance_coefficient,
        "output_router_logits": router.balance_coefficient > 0,
        "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size": routed[0].expert_size,
    }
    if kind == "qwen3_moe":
        only = [i for i, block in enumerate(pattern) if isinstance(block.feed_forward, dense.Settings)]
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": only}
    return fields
