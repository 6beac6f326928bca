"""Weights of the Mixture-of-Recursions code as its authors released it, in and out.

Linear weights there are [out, in] and every layer has tensors of its own name; a tensor that layers share is stored
once, under the name of its first use, and may come again under its other names. Names by family:

vanilla, recursive     model.layers.I                    I the layer of the unrolled network
MoR, expert choice     model.layers.P.block.J            P the recursion's place (1.. for middle_cycle, 0.. for cycle)
MoR, token choice      model.layers.P.block_list.R.J     R the recursion, P its place (1 or 0)

Here the layers of the block are stacked, and attention weights have an axis for the heads.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.official_mor_config import config_from_official
from adaptive.interop.tensors import Layout, Leaf, Part, Path, built, checked, parts_of, same, taken_apart
from adaptive.layers.router import EXPANSION
from adaptive.models.config import TransformerConfig
from adaptive.models.transformer import Transformer

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def from_official(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Transformer:
    """The model with `tensors` as its parameters; see adaptive.interop.from_official.

    Released recursive models have an output head of their own although their configuration says it is tied; a
    `lm_head.weight` that differs from the embedding is read as that. A wide_mlp router whose tensors are four times the
    width, as the paper has it, is read as that too. A loss-free bias that is left out is zero.
    """
    ours = _as_stored(config_from_official(config), tensors)
    layout = official_layout(ours)
    parts = parts_of(layout)
    given = _optional(ours, parts) | dict(_with_place(tensors, ours))
    named = checked("mor", given, parts, _aliases(ours))
    return built(ours, layout, named)


def to_official(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's tensors f32 under their official names, each distinct one once."""
    if not isinstance(model, Transformer):
        raise CheckpointError(f"official mor: a {type(model).__name__} has no official names, only a Transformer has")
    return taken_apart(model, official_layout(model.config))


def official_layout(config: TransformerConfig) -> Layout:
    """Where each parameter of `Transformer(config)` lies among the official tensors, by its path in the nnx state."""
    c, r = config, config.router
    width, vocab = c.hidden_size, (c.vocab_size, c.hidden_size)
    layout: Layout = {
        ("embedding",): Leaf((), (Part(_EMBEDDING, vocab, False),)),
        ("norm", "weight"): Leaf((), (Part("model.norm.weight", (width,), False),)),
    }
    if not c.tie_embeddings:
        layout["head",] = Leaf((), (Part(_HEAD, vocab, False),))
    stack, block = _block_prefixes(c)
    groups = [("block", stack, block)]
    if c.unique_ends:
        groups += [("first", (), ["model.layers.0"]), ("last", (), [f"model.layers.{_last(c)}"])]
    for group, lead, prefixes in groups:
        for path, name, shape in _layer_tensors(c):
            parts = tuple(Part(f"{p}.{name}.weight", shape, len(shape) == 2) for p in prefixes)
            layout[group, *path] = Leaf(lead, parts)
    if r.kind == "none":
        return layout
    expert = r.kind == "expert_choice"
    choices, places = (1, c.recursions) if expert else (c.recursions, 1)
    for i in range(places):
        prefix = f"model.layers.{c.unique_ends + i}"
        layout |= _router_leaves(c, ("routers", i), f"{prefix}.mor_router.router", choices)
        if expert and r.sampling == "aux_router":
            layout |= _router_leaves(c, ("aux_routers", i), f"{prefix}.mlp_router.router", choices)
    if not expert and r.balancing == "loss_free":
        layout["router_bias",] = Leaf((), (Part(f"model.layers.{int(c.unique_ends)}.router_bias", (choices,), False),))
    return layout


def _layer_tensors(c: TransformerConfig) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """(path in a DecoderLayer, official name, official shape) of each tensor of one layer."""
    width, inner = c.hidden_size, c.intermediate_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield ("attention_norm", "weight"), "input_layernorm", (width,)
    yield ("feed_forward_norm", "weight"), "post_attention_layernorm", (width,)
    for name, shape in (("q", (queries, width)), ("k", (keys, width)), ("v", (keys, width)), ("o", (width, queries))):
        yield ("attention", name), f"self_attn.{name}_proj", shape
    for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
        yield ("feed_forward", name), f"mlp.{name}_proj", shape


def _router_leaves(c: TransformerConfig, path: Path, name: str, choices: int) -> Layout:
    inner = EXPANSION[c.router.network] * c.hidden_size
    if not inner:
        return {(*path, "out"): Leaf((), (Part(f"{name}.weight", (choices, c.hidden_size), True),))}
    return {
        (*path, "hidden"): Leaf((), (Part(f"{name}.0.weight", (inner, c.hidden_size), True),)),
        (*path, "out"): Leaf((), (Part(f"{name}.2.weight", (choices, inner), True),)),
    }


def _block_prefixes(c: TransformerConfig) -> tuple[tuple[int, ...], list[str]]:
    """Layer axes of the block's parameters, and the official prefix of each layer in row-major order."""
    first, n, b = int(c.unique_ends), c.recursions, c.block_size
    if c.router.kind != "none":
        inside = "block" if c.router.kind == "expert_choice" else "block_list.0"
        return (b,), [f"model.layers.{first}.{inside}.{j}" for j in range(b)]
    if c.share_parameters or n == 1:
        apart = n if c.sharing in ("sequence", "middle_sequence") else 1
        return (b,), [f"model.layers.{first + j * apart}" for j in range(b)]
    stack = (b, n) if c.sharing in ("sequence", "middle_sequence") else (n, b)
    return stack, [f"model.layers.{first + i}" for i in range(n * b)]


def _last(c: TransformerConfig) -> int:
    return {"none": c.num_layers - 1, "expert_choice": c.recursions + 1, "token_choice": 2}[c.router.kind]


def _aliases(c: TransformerConfig) -> dict[str, str]:
    """Other name of a layer or tensor -> its first one, which alone is read."""
    first, n, b = int(c.unique_ends), c.recursions, c.block_size
    aliases = {_HEAD: _EMBEDDING} if c.tie_embeddings else {}
    if c.router.kind == "expert_choice":
        pairs = [(f"{first + r}.block.{j}", f"{first}.block.{j}") for r in range(1, n) for j in range(b)]
    elif c.router.kind == "token_choice":
        pairs = [(f"{first}.block_list.{r}.{j}", f"{first}.block_list.0.{j}") for r in range(1, n) for j in range(b)]
    elif c.share_parameters and n > 1:
        by_set: dict[int, int] = {}
        uses = [(layer, by_set.setdefault(c.parameter_index(layer), layer)) for layer in range(c.num_layers)]
        pairs = [(str(layer), str(source)) for layer, source in uses if layer != source]
    else:
        pairs = []
    for other, canonical in pairs:
        for _, name, _ in _layer_tensors(c):
            aliases[f"model.layers.{other}.{name}.weight"] = f"model.layers.{canonical}.{name}.weight"
    return aliases


def _as_stored(c: TransformerConfig, tensors: Mapping[str, Any]) -> TransformerConfig:
    """The configuration with what the tensors themselves decide: an untied head, the width of a router."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if c.family == "recursive" and c.tie_embeddings and head is not None and not same(head, embedding):
        c = dataclasses.replace(c, tie_embeddings=False)
    if c.router.network == "mlp":
        wide = (EXPANSION["wide_mlp"] * c.hidden_size, c.hidden_size)
        name = f"model.layers.{int(c.unique_ends)}.mor_router.router.0.weight"
        if name in tensors and tuple(tensors[name].shape) == wide:
            c = dataclasses.replace(c, router=dataclasses.replace(c.router, network="wide_mlp"))
    return c


def _with_place(tensors: Mapping[str, Any], c: TransformerConfig) -> Mapping[str, Any]:
    """Token choice with sharing cycle is all there is under model.layers, and may be stored without the place 0."""
    if c.router.kind != "token_choice" or c.unique_ends:
        return tensors
    bare = ("model.layers.block_list.", "model.layers.mor_router.", "model.layers.router_bias")
    return {
        name.replace("model.layers.", "model.layers.0.", 1) if name.startswith(bare) else name: value
        for name, value in tensors.items()
    }


def _optional(c: TransformerConfig, parts: Mapping[str, Part]) -> dict[str, Any]:
    """What a checkpoint may leave out: a bias that has not moved yet, and the routers that random choice ignores."""
    random, bias = c.router.random, ".router_bias"
    return {
        name: np.zeros(part.shape, np.float32)
        for name, part in parts.items()
        if name.endswith(bias) or (random and ".mor_router." in name)
    }
