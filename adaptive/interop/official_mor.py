"""Weights of the Mixture-of-Recursions code as its authors released it, in and out.

Linear weights there are [out, in] and every layer has tensors of its own name; a tensor that layers share is stored
once, under the name of its first use, and may come again under its other names. Names by family:

vanilla, recursive     model.layers.I                    I the layer of the unrolled network
MoR, expert choice     model.layers.P.block.J            P the recursion's place (1.. for middle_cycle, 0.. for cycle)
MoR, token choice      model.layers.P.block_list.R.J     R the recursion, P its place (1 or 0)

Here the layers of a stack are stacked, and attention weights have an axis for the heads.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.llama import EMBEDDING, HEAD, block_parts, ends_layout
from adaptive.interop.official_mor_config import config_from_official
from adaptive.interop.tensors import (
    Layout,
    Part,
    Path,
    built,
    checked,
    language_model_of,
    one,
    parts_of,
    same,
    stack_layout,
    taken_apart,
)
from adaptive.layers import stack
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.router import EXPANSION
from adaptive.models import language_model
from adaptive.models.bodies import plain, recursive
from adaptive.models.depth import expert_choice, token_choice
from adaptive.models.language_model import LanguageModel
from adaptive.settings import with_leaf

KIND = "mor"


def from_official(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> LanguageModel:
    """The model with `tensors` as its parameters; see adaptive.interop.from_official.

    Released recursive models have an output head of their own although their configuration says it is tied; a
    `lm_head.weight` that differs from the embedding is read as that. A wide_mlp router whose tensors are four times the
    width, as the paper has it, is read as that too. A loss-free bias that is left out is zero.
    """
    ours = _as_stored(config_from_official(config), tensors)
    layout = official_layout(ours)
    parts = parts_of(layout)
    given = _optional(ours.body, parts) | dict(_with_place(tensors, ours.body))
    return built(ours, layout, checked(KIND, given, parts, _aliases(ours, parts)))


def to_official(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's tensors f32 under their official names, each distinct one once."""
    model = language_model_of(KIND, model)
    if why := foreign(model.settings):
        raise CheckpointError(f"official {KIND}: a released model {why}, this one differs")
    return taken_apart(KIND, model, official_layout(model.settings))


def official_layout(settings: language_model.Settings) -> Layout:
    """Where each parameter of the model lies among the official tensors, by its path in the nnx state."""
    body = settings.body
    parts = functools.partial(block_parts, width=settings.width)
    if isinstance(body, plain.Settings):
        numbered = [f"model.layers.{i}" for i in range(body.layers)]
        ends = ends_layout(settings, ("body", "stack", "norm", "weight"))
        return ends | stack_layout(("body", "stack"), body.stack, parts, numbered)
    assert isinstance(body, recursive.Settings)
    layout = ends_layout(settings, ("body", "norm", "weight"))
    names = _core_names(body)
    layout |= stack_layout(("body", "core"), body.core, parts, *(names if body.shared == "none" else names[:1]))
    for name, end, number in (("prelude", body.prelude, 0), ("coda", body.coda, _after_core(body))):
        if end is not None:
            layout |= stack_layout(("body", name), end, parts, [f"model.layers.{number}"])
    return layout | _router_layout(body, settings.width)


def _core_names(body: recursive.Settings) -> list[list[str]]:
    """Official name of each layer of the core, in every pass."""
    first, passes, layers = _first(body), range(body.recursions), range(body.core.layers)
    if isinstance(body.depth, expert_choice.Settings):
        return [[f"model.layers.{first + r}.block.{j}" for j in layers] for r in passes]
    if isinstance(body.depth, token_choice.Settings):
        return [[f"model.layers.{first}.block_list.{r}.{j}" for j in layers] for r in passes]
    if body.order == "cycle":
        return [[f"model.layers.{first + r * len(layers) + j}" for j in layers] for r in passes]
    return [[f"model.layers.{first + j * len(passes) + r}" for j in layers] for r in passes]


def _first(body: recursive.Settings) -> int:
    """Number of the core's first layer."""
    return int(body.prelude is not None)


def _after_core(body: recursive.Settings) -> int:
    """Number of the layer behind the core, as the released code counts: each pass, or all of them, may be one."""
    if isinstance(body.depth, expert_choice.Settings):
        return _first(body) + body.recursions
    if isinstance(body.depth, token_choice.Settings):
        return _first(body) + 1
    return _first(body) + body.recursions * body.core.layers


def _router_layout(body: recursive.Settings, width: int) -> Layout:
    depth, first, path = body.depth, _first(body), ("body", "depth")
    layout: Layout = {}
    if isinstance(depth, expert_choice.Settings):
        for r in range(body.recursions):
            prefix = f"model.layers.{first + r}"
            layout |= _router_parts((*path, "routers", r), f"{prefix}.mor_router.router", depth.network, width, 1)
            if depth.sampling == "aux_router":
                layout |= _router_parts(
                    (*path, "aux_routers", r), f"{prefix}.mlp_router.router", depth.network, width, 1
                )
    if isinstance(depth, token_choice.Settings):
        prefix, choices = f"model.layers.{first}", body.recursions
        layout |= _router_parts((*path, "router"), f"{prefix}.mor_router.router", depth.network, width, choices)
        if depth.balancing == "loss_free":
            layout[*path, "bias"] = one(f"{prefix}.router_bias", (choices,))
    return layout


def _router_parts(path: Path, name: str, network: str, width: int, choices: int) -> Layout:
    inner = EXPANSION[network] * width
    if not inner:
        return {(*path, "out"): one(f"{name}.weight", (choices, width), True)}
    return {
        (*path, "hidden"): one(f"{name}.0.weight", (inner, width), True),
        (*path, "out"): one(f"{name}.2.weight", (choices, inner), True),
    }


def _aliases(settings: language_model.Settings, parts: Mapping[str, Part]) -> dict[str, str]:
    """Other name of a tensor -> its first one, which alone is read."""
    aliases = {HEAD: EMBEDDING} if settings.tie_embeddings else {}
    body = settings.body
    if isinstance(body, recursive.Settings) and body.shared == "all":
        firsts, *others = _core_names(body)
        for again in others:
            for other, first in zip(again, firsts, strict=True):
                inside = (name for name in parts if name.startswith(f"{first}."))
                aliases |= {other + name.removeprefix(first): name for name in inside}
    return aliases


def _as_stored(settings: language_model.Settings, tensors: Mapping[str, Any]) -> language_model.Settings:
    """The settings with what the tensors themselves decide: an untied head, the width of a router."""
    head, embedding, body = tensors.get(HEAD), tensors.get(EMBEDDING), settings.body
    if not isinstance(body, recursive.Settings):
        return settings
    alone = body.depth.equal_passes and body.shared == "all"  # recursive, and not a Mixture-of-Recursions
    if alone and settings.tie_embeddings and head is not None and not same(head, embedding):
        settings = dataclasses.replace(settings, tie_embeddings=False)
    if getattr(body.depth, "network", "") == "mlp":
        wide = (EXPANSION["wide_mlp"] * settings.width, settings.width)
        name = f"model.layers.{_first(body)}.mor_router.router.0.weight"
        if name in tensors and tuple(tensors[name].shape) == wide:
            settings = with_leaf(settings, "body.depth.network", "wide_mlp")
    return settings


def _with_place(tensors: Mapping[str, Any], body: Any) -> Mapping[str, Any]:
    """Token choice with sharing cycle is all there is under model.layers, and may be stored without the place 0."""
    routed = isinstance(body, recursive.Settings) and isinstance(body.depth, token_choice.Settings)
    if not routed or body.prelude is not None:
        return tensors
    bare = ("model.layers.block_list.", "model.layers.mor_router.", "model.layers.router_bias")
    return {
        name.replace("model.layers.", "model.layers.0.", 1) if name.startswith(bare) else name: value
        for name, value in tensors.items()
    }


def _optional(body: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """What a checkpoint may leave out: a bias that has not moved yet, and the routers that random choice ignores."""
    random = isinstance(body, recursive.Settings) and getattr(body.depth, "random", False)
    return {
        name: np.zeros(part.shape, np.float32)
        for name, part in parts.items()
        if name.endswith(".router_bias") or (random and ".mor_router." in name)
    }


def foreign(settings: language_model.Settings) -> str:
    """What a released model has and one of these settings has not; empty where it fits."""
    body = settings.body
    if isinstance(body, plain.Settings):
        stacks = [body.stack]
    elif isinstance(body, recursive.Settings):
        stacks = [body.core, *body.ends]
        if body.depth.kind() not in ("all", "expert_choice", "token_choice"):
            return "has depth=all, expert_choice or token_choice"
        if body.shared == "mixers":
            return "shares whole layers (shared=all or none)"
        if {end and end.layers for end in (body.prelude, body.coda)} not in ({None}, {1}):
            return "has one layer before its core and one behind it, or none"
    else:
        return "is a plain or a recursive one (model.body=plain or recursive)"
    return _foreign_blocks(stacks)


def _foreign_blocks(stacks: list[stack.Settings]) -> str:
    blocks = {dataclasses.replace(block, repeat=1) for own in stacks for block in own.blocks}
    if len(blocks) > 1:
        return "has equal layers"
    (block,) = blocks
    attention = block.mixer
    if not isinstance(attention, Attention) or not isinstance(block.feed_forward, Dense):
        return "has attention and a dense feed-forward in every layer"
    free = ("heads", "kv_heads", "head_dim", "rotary_dim", "rope_theta")
    plain_one = Attention(**{name: getattr(attention, name) for name in free})
    if attention != plain_one or attention.rotated != attention.head_dim:
        return "has attention as in Llama, all of whose channels rotate: without windows, biases, norms or bounds"
    return ""
