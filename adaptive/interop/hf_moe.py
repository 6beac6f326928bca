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

Here layers are stacked, and their experts, and attention weights have an axis for the heads.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.hf_moe_config import QK_NORMS, Kind, config_from_transformers
from adaptive.interop.tensors import (
    Layout,
    Leaf,
    Part,
    Path,
    built,
    checked,
    misshapen,
    parts_of,
    same,
    taken_apart,
    traced,
)
from adaptive.layers.moe.base import parse_options
from adaptive.layers.moe.routers.token_choice import Options
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.config import TransformerConfig
from adaptive.models.transformer import Transformer

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# (router, name of one expert's gate, up and down) inside a layer
_ROUTED: dict[Kind, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def from_official(kind: Kind, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Transformer:
    """The model with `tensors` as its parameters; see adaptive.interop.from_official.

    `config` is config.json as a dict, of any version of the library. Old checkpoints' rotary frequencies are ignored.
    A tied model may repeat its embedding as the output head, or have the head alone; a head that differs is read as one
    of its own, as the library does. While traced, two such tensors are taken to be the same, and the gradient is the
    embedding's.
    """
    ours, tensors = _with_head(config_from_transformers(kind, config), tensors)
    layout = official_layout(kind, ours)
    return built(ours, layout, checked(kind, _published(kind, tensors, ours), parts_of(layout), {}))


def to_official(kind: Kind, model: nnx.Module) -> dict[str, jax.Array]:
    """The model's tensors f32 under the names of a published checkpoint."""
    if not isinstance(model, Transformer):
        raise CheckpointError(
            f"official {kind}: a {type(model).__name__} has no official names, only a Transformer has"
        )
    if why := _foreign(kind, model.config):
        raise CheckpointError(f"official {kind}: a model of this kind {why}, this one differs")
    return taken_apart(model, official_layout(kind, model.config))


def official_layout(kind: Kind, config: TransformerConfig) -> Layout:
    """Where each parameter of `Transformer(config)` lies among the published tensors."""
    c = config
    vocab = (c.vocab_size, c.hidden_size)
    layout: Layout = {
        ("embedding",): Leaf((), (Part(_EMBEDDING, vocab, False),)),
        ("norm", "weight"): Leaf((), (Part("model.norm.weight", (c.hidden_size,), False),)),
    }
    if not c.tie_embeddings:
        layout["head",] = Leaf((), (Part(_HEAD, vocab, False),))
    routed = c.moe.router != "none"
    dense = [i for i in range(c.num_layers) if i in c.moe.dense_layers] if routed else []
    stacks = {"block": [i for i in range(c.num_layers) if i not in dense], "dense": dense}
    for stack, numbers in stacks.items():
        prefixes = [f"model.layers.{i}" for i in numbers]
        if not prefixes:
            continue
        experts = routed and stack == "block"
        for path, name, shape in _layer_tensors(c, dense=not experts):
            parts = tuple(Part(f"{p}.{name}", shape, len(shape) == 2) for p in prefixes)
            layout[stack, *path] = Leaf((len(prefixes),), parts)
        if experts:
            for path, leaf in _expert_leaves(kind, c, prefixes):
                layout[stack, *path] = leaf
    return layout


def _layer_tensors(c: TransformerConfig, *, dense: bool) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """(path in a DecoderLayer, official name, official shape) of each tensor of one layer, experts left out."""
    width, inner = c.hidden_size, c.intermediate_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield ("attention_norm", "weight"), "input_layernorm.weight", (width,)
    yield ("feed_forward_norm", "weight"), "post_attention_layernorm.weight", (width,)
    for name, shape in (("q", (queries, width)), ("k", (keys, width)), ("v", (keys, width)), ("o", (width, queries))):
        yield ("attention", name), f"self_attn.{name}_proj.weight", shape
        if c.attention_bias:
            yield ("attention", f"{name}_bias"), f"self_attn.{name}_proj.bias", shape[:1]
    if c.qk_norm != "none":
        whole = c.qk_norm == "full"
        yield ("attention", "q_norm", "weight"), "self_attn.q_norm.weight", (queries if whole else c.head_dim,)
        yield ("attention", "k_norm", "weight"), "self_attn.k_norm.weight", (keys if whole else c.head_dim,)
    if dense:
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield ("feed_forward", name), f"mlp.{name}_proj.weight", shape


def _expert_leaves(kind: Kind, c: TransformerConfig, prefixes: list[str]) -> Iterator[tuple[Path, Leaf]]:
    """Router and experts of the layers at `prefixes`."""
    width, inner, count = c.hidden_size, _expert_size(c), c.moe.experts
    module, names = _ROUTED[kind]
    routers = tuple(Part(f"{p}.{module}.gate.weight", (count, width), True) for p in prefixes)
    yield ("feed_forward", "router", "weight"), Leaf((len(prefixes),), routers)
    shapes = ((inner, width), (inner, width), (width, inner))
    for ours, theirs, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        parts = tuple(
            Part(f"{p}.{module}.experts.{e}.{theirs}.weight", shape, True) for p in prefixes for e in range(count)
        )
        yield ("feed_forward", "experts", ours), Leaf((len(prefixes), count), parts)


def _with_head(c: TransformerConfig, tensors: Mapping[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """The configuration, untied where the head has values of its own, and the tensors without a head that is tied."""
    tensors = dict(tensors)
    if not c.tie_embeddings or _HEAD not in tensors:
        return c, tensors
    head, embedding = tensors[_HEAD], tensors.get(_EMBEDDING)
    if embedding is not None and not same(head, embedding) and not traced(head, embedding):
        return dataclasses.replace(c, tie_embeddings=False), tensors
    tensors.setdefault(_EMBEDDING, tensors.pop(_HEAD))
    return c, tensors


def _published(kind: Kind, tensors: Mapping[str, Any], c: TransformerConfig) -> dict[str, Any]:
    """`tensors` under published names: fused experts are cut apart, what old checkpoints hold besides is left out."""
    named = {name: value for name, value in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    module, (gate, up, down) = _ROUTED[kind]
    count, inner, width = c.moe.experts, _expert_size(c), c.hidden_size
    for i in range(c.num_layers):
        if c.moe.router == "none" or i in c.moe.dense_layers:
            continue
        prefix = f"model.layers.{i}"
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
    return named


def _expert_size(c: TransformerConfig) -> int:
    return c.moe.expert_size or c.intermediate_size


def _foreign(kind: Kind, c: TransformerConfig) -> str:
    """What a model of this kind has and one of this configuration has not; empty where it fits."""
    if c.recursions != 1:
        return "has no recursions (model.recursions=1)"
    if c.qk_norm != QK_NORMS[kind]:
        return f"has model.qk_norm={QK_NORMS[kind]}"
    if kind == "mixtral" and c.attention_bias:
        return "has no biases (model.attention_bias=false)"
    if kind != "olmoe" and c.clip_qkv:
        return "does not clip (model.clip_qkv=0)"
    if kind == "olmoe" and (c.attention_window or c.num_heads * c.head_dim != c.hidden_size):
        return "has no window and heads that split the width (model.num_heads * model.head_dim = model.hidden_size)"
    m = c.moe
    if kind == "qwen3_moe" and m.router == "none":
        return ""
    plain = MoEConfig(router="token_choice")
    alike = ("router", "shared_size", "gated", "activation", "capacity_factor")
    if wrong := next((name for name in alike if getattr(m, name) != getattr(plain, name)), None):
        return f"has model.moe.{wrong}={str(getattr(plain, wrong)).lower()}"
    if kind != "qwen3_moe" and m.dense_layers:
        return "has experts in every layer (model.moe.dense_layers empty)"
    if kind != "qwen3_moe" and _expert_size(c) != c.intermediate_size:
        return "has experts of one size, model.intermediate_size"
    given, usual = parse_options(Options, m), Options()
    computed = ["score", "route_scale", "bias", "groups", "jitter", "scale_to_shared"]
    computed += ["normalise"] * (kind == "mixtral")
    if wrong := next((name for name in computed if getattr(given, name) != getattr(usual, name)), None):
        return f"has the router setting {wrong}={str(getattr(usual, wrong)).lower()}"
    return ""
