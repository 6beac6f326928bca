"""Whole mixture-of-experts models under Hugging Face names: Mixtral, OLMoE, Qwen3-MoE, in and out.

Linear weights there are [out, in], and published checkpoints have a matrix per expert:

mixtral           model.layers.I.block_sparse_moe.gate                router
                  model.layers.I.block_sparse_moe.experts.E.w1/w3/w2  gate, up, down
olmoe, qwen3_moe  model.layers.I.mlp.gate                             router
                  model.layers.I.mlp.experts.E.gate_proj/up_proj/down_proj
                  model.layers.I.mlp.gate_proj/up_proj/down_proj      dense layers (qwen3_moe)

transformers 5 holds a layer's experts in two tensors, which are read as well: mlp.experts.gate_up_proj
[experts, 2 hidden, width], gate first, and mlp.experts.down_proj [experts, width, hidden]; Mixtral's router is mlp.gate
there.

Here equal layers are stacked, and their experts, and attention weights have an axis for the heads.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from adaptive.errors import CheckpointError, RecipeError
from adaptive.interop import llama
from adaptive.interop.families import Family
from adaptive.interop.fields import Fields
from adaptive.interop.hf_moe_config import (
    DEFAULTS,
    QK_NORMS,
    Kind,
    config_from_transformers,
    config_to_transformers,
)
from adaptive.interop.llama import with_head
from adaptive.interop.tensors import Layout, Part, Path, misshapen, stack_layout
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.feed_forwards.experts import Settings as Experts
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.moe.routers import token_choice
from adaptive.models import language_model
from adaptive.models.bodies import plain

# (router, name of one expert's gate, up and down) inside a layer
_ROUTED: dict[Kind, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


class Routed(Family):
    """A family whose layers have experts."""

    def __init__(self, kind: Kind, architecture: str):
        self._kind: Kind = kind
        self.architecture, self.model_type, self.defaults = architecture, kind, DEFAULTS[kind]

    def settings(self, fields: Fields) -> language_model.Settings:
        return config_from_transformers(self._kind, fields.all_given)

    def config(self, settings: language_model.Settings) -> dict[str, Any]:
        if why := _foreign(self._kind, settings):
            raise RecipeError(why)
        return config_to_transformers(self._kind, self.architecture, settings)

    def layout(self, settings: language_model.Settings) -> Layout:
        return official_layout(self._kind, settings)

    def tidied(
        self, settings: language_model.Settings, tensors: Mapping[str, Any]
    ) -> tuple[language_model.Settings, dict[str, Any]]:
        settings, tensors = with_head(settings, tensors)
        return settings, _published(self._kind, tensors, settings)


def official_layout(kind: Kind, settings: language_model.Settings) -> Layout:
    """Where each parameter of the model lies among the published tensors."""
    body = settings.body
    assert isinstance(body, plain.Settings)
    names = [f"model.layers.{i}" for i in range(body.layers)]
    parts = functools.partial(_block_parts, kind=kind, width=settings.width)
    ends = llama.ends_layout(settings, ("body", "stack", "norm", "weight"))
    return ends | stack_layout(("body", "stack"), body.stack, parts, names)


def _block_parts(block: Block, kind: Kind, width: int) -> Iterator[tuple[Path, Part]]:
    """(path in a block, published tensor inside its layer) of each parameter of one block."""
    yield from llama.block_parts(block, width)
    if not isinstance(block.feed_forward, Experts):
        return
    module, names = _ROUTED[kind]
    count, inner = block.feed_forward.experts, block.feed_forward.expert_size
    yield ("feed_forward", "router", "weight"), Part(f"{module}.gate.weight", (count, width), True)
    shapes = ((inner, width), (inner, width), (width, inner))
    for ours, theirs, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        for e in range(count):
            yield ("feed_forward", "experts", ours), Part(f"{module}.experts.{e}.{theirs}.weight", shape, True)


def _published(kind: Kind, tensors: Mapping[str, Any], settings: language_model.Settings) -> dict[str, Any]:
    """`tensors` under published names: fused experts are cut apart, what old checkpoints hold besides is left out."""
    named = {name: value for name, value in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    body = settings.body
    assert isinstance(body, plain.Settings)
    for i, block in enumerate(body.stack.blocks):
        if isinstance(block.feed_forward, Experts):
            for layer in body.stack.numbers(i):
                _cut_apart(kind, named, f"model.layers.{layer}", block.feed_forward, settings.width)
    return named


def _cut_apart(kind: Kind, named: dict[str, Any], prefix: str, settings: Experts, width: int) -> None:
    """Replaces what transformers 5 holds of the layer at `prefix` by the published tensors, in place."""
    module, (gate, up, down) = _ROUTED[kind]
    count, inner = settings.experts, settings.expert_size
    both, last = f"{prefix}.mlp.experts.gate_up_proj", f"{prefix}.mlp.experts.down_proj"
    experts = [f"{prefix}.{module}.experts.{e}" for e in range(count)]
    cut: dict[str, dict[str, Any]] = {
        f"{prefix}.mlp.gate.weight": {f"{prefix}.{module}.gate.weight": ...},
        both: {f"{name}.{gate}.weight": (e, slice(0, inner)) for e, name in enumerate(experts)}
        | {f"{name}.{up}.weight": (e, slice(inner, None)) for e, name in enumerate(experts)},
        last: {f"{name}.{down}.weight": (e,) for e, name in enumerate(experts)},
    }
    for name, shape in ((both, (count, 2 * inner, width)), (last, (count, width, inner))):
        if name in named and tuple(named[name].shape) != shape:
            raise CheckpointError(misshapen(kind, name, named[name], shape))
    for name, places in cut.items():
        if name not in named or name in places:
            continue
        value = named.pop(name)
        if twice := next((other for other in places if other in named), None):
            raise CheckpointError(f"official {kind}: {name} and {twice} are the same weights; give one form")
        named |= {other: value[place] for other, place in places.items()}


def _foreign(kind: Kind, settings: language_model.Settings) -> str:
    """What a model of this kind has and one of these settings has not; empty where it fits."""
    body = settings.body
    if not isinstance(body, plain.Settings):
        return f"is one stack (body=plain), not {body.kind()}"
    blocks = body.stack.blocks
    if any(block.mixer != blocks[0].mixer for block in blocks) or not isinstance(blocks[0].mixer, Attention):
        return "has the same attention in every layer"
    if why := _foreign_attention(kind, blocks[0].mixer, settings.width):
        return why
    feed_forwards = {block.feed_forward for block in blocks}
    routed = [own for own in feed_forwards if isinstance(own, Experts)]
    dense = [own for own in feed_forwards if isinstance(own, Dense)]
    if len(routed) + len(dense) < len(feed_forwards) or len(routed) > 1 or len(dense) > 1:
        return "has one kind of experts and of dense feed-forwards at most"
    if kind != "qwen3_moe" and dense:
        return "has experts in every layer (feed_forward=experts)"
    return next((why for own in routed if (why := _foreign_experts(kind, own))), "")


def _foreign_attention(kind: Kind, attention: Attention, width: int) -> str:
    if attention.rotated != attention.head_dim:
        return "rotates all channels (rotary_dim=-1)"
    if attention.qk_norm != QK_NORMS[kind]:
        return f"has qk_norm={QK_NORMS[kind]}"
    if attention.bias not in (("none",) if kind == "mixtral" else ("none", "all")):
        return "has no biases (bias=none)" if kind == "mixtral" else "has biases of all projections or of none"
    if kind != "olmoe" and attention.clip_qkv:
        return "does not clip (clip_qkv=0)"
    if kind == "olmoe" and (attention.window or attention.heads * attention.head_dim != width):
        return "has no window and heads that split the width (heads * head_dim = width)"
    return ""


def _foreign_experts(kind: Kind, experts: Experts) -> str:
    router, usual = experts.router, Experts()
    if not isinstance(router, token_choice.Settings):
        return "has router=token_choice"
    if wrong := next(
        (n for n in ("shared_size", "gated", "activation") if getattr(experts, n) != getattr(usual, n)), ""
    ):
        return f"has {wrong}={str(getattr(usual, wrong)).lower()}"
    computed = ["score", "route_scale", "bias", "groups", "jitter", "noise", "scale_to_shared", "capacity_factor"]
    computed += ["normalise"] * (kind == "mixtral")
    if wrong := next((n for n in computed if getattr(router, n) != getattr(token_choice.Settings(), n)), ""):
        return f"has router.{wrong}={str(getattr(token_choice.Settings(), wrong)).lower()}"
    return ""
