"""Released H-Net checkpoints (goombalab/hnet), in and out.

Names there, of a stack of blocks P: `backbone.encoder`, `backbone.decoder`, and inside `backbone.main_network` the same
again, or of the innermost stage `.main_network` once more:

    P.layers.I.norm1                                  norm before the mixer
    P.layers.I.mixer.Wqkv, out_proj                   attention: queries, keys and values one below the other
    P.layers.I.mixer.in_proj, conv1d, dt_bias, A_log, D, norm, out_proj
                                                      Mamba-2: rows of in_proj are z, x, B, C, dt; of conv1d x, B, C
    P.layers.I.norm2, mlp.fc1, mlp.fc2                SwiGLU: rows of fc1 are the value, then the gate
    P.rmsnorm                                         norm after the last block
    S.routing_module.{q,k}_proj_layer, S.residual_proj, S.pad_dimension   of a stage S
    embeddings, lm_head

Linear weights are [out, in]. Here equal blocks are stacked, and heads have an axis.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.official_hnet_config import (
    NORM_EPS,
    ROPE_THETA,
    SWIGLU_MULTIPLE,
    Stage,
    config_from_official,
    stages_of,
)
from adaptive.interop.official_hnet_layout import block_of, letter_of
from adaptive.interop.tensors import (
    Layout,
    Part,
    Path,
    built,
    checked,
    language_model_of,
    one,
    parts_of,
    stack_layout,
    taken_apart,
)
from adaptive.layers import stack
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.mixers.mamba2 import Settings as Mamba2
from adaptive.models import language_model
from adaptive.models.bodies import hnet, plain
from adaptive.models.language_model import LanguageModel

KIND = "hnet"
_HEAD, _EMBEDDING = "lm_head.weight", "embeddings.weight"


def from_official(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> LanguageModel:
    """The model with `tensors` as its parameters; see adaptive.interop.from_official.

    `config` is the JSON of the release as a dict (see `config_from_official` for what it may have besides). Averages
    of chunks are float32; the release rounds them to bfloat16, which moves logits by about 1e-2. Chunks have no limit.
    """
    ours = config_from_official(config)
    layout = official_layout(ours)
    aliases = {_HEAD: _EMBEDDING} if ours.tie_embeddings else {}
    return built(ours, layout, checked(KIND, tensors, parts_of(layout), aliases))


def to_official(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's tensors f32 under the release's names."""
    model = language_model_of(KIND, model)
    if why := foreign(model.settings):
        raise CheckpointError(f"official {KIND}: a released model {why}, this one differs")
    return taken_apart(KIND, model, official_layout(model.settings))


def official_layout(settings: language_model.Settings) -> Layout:
    """Where each parameter of the model lies among the official tensors, by its path in the nnx state."""
    vocab = (settings.vocab_size, settings.width)
    found: Layout = {("embedding",): one(_EMBEDDING, vocab)}
    if not settings.tie_embeddings:
        found["head",] = one(_HEAD, vocab)
    *chunking, innermost = stages_of(settings)
    path: Path = ("body",)
    prefix, outside = "backbone", settings.width
    for stage in chunking:
        found |= _widening(path, prefix, outside, stage.width) | _stage_layout(path, prefix, stage)
        path, prefix, outside = (*path, "inner"), f"{prefix}.main_network", stage.width
    found |= _widening(path, prefix, outside, innermost.width)
    return found | _stack_leaves((*path, "stack"), f"{prefix}.main_network", innermost.stacks[0], innermost.width)


def _widening(path: Path, prefix: str, outside: int, width: int) -> Layout:
    """What widens the stream that enters the stage at `path`: a parameter of the stage around it."""
    if width == outside:
        return {}
    return {(*path[:-1], "pad"): one(f"{prefix}.pad_dimension", (width - outside,))}


def _stage_layout(path: Path, prefix: str, stage: Stage) -> Layout:
    """The parameters of a chunking stage, what is inside left out."""
    encoder, decoder = stage.stacks
    square = (stage.width, stage.width)
    found = _stack_leaves((*path, "encoder"), f"{prefix}.encoder", encoder, stage.width)
    found |= _stack_leaves((*path, "decoder"), f"{prefix}.decoder", decoder, stage.width)
    for x in "qk":
        found[*path, "chunker", x] = one(f"{prefix}.routing_module.{x}_proj_layer.weight", square, True)
    found[*path, "residual", "weight"] = one(f"{prefix}.residual_proj.weight", square, True)
    found[*path, "residual", "bias"] = one(f"{prefix}.residual_proj.bias", square[:1])
    return found


def _stack_leaves(path: Path, prefix: str, settings: stack.Settings, width: int) -> Layout:
    """The parameters of a stack and its norm."""
    names = [f"{prefix}.layers.{i}" for i in range(settings.layers)]
    parts = functools.partial(_block_parts, width=width)
    norm: Layout = {(*path, "norm", "weight"): one(f"{prefix}.rmsnorm.weight", (width,))}
    return norm | stack_layout(path, settings, parts, names)


def _block_parts(block: Block, width: int) -> Iterator[tuple[Path, Part]]:
    """(path in a block, official tensor inside its layer) of each parameter of one block."""
    yield ("mixer_norm", "weight"), Part("norm1.weight", (width,), False)
    mixer, feed_forward = block.mixer, block.feed_forward
    mixes = _mamba_parts(mixer, width) if isinstance(mixer, Mamba2) else _attention_parts(width)
    for name, part in mixes:
        yield ("mixer", name), part._replace(name=f"mixer.{part.name}")
    if isinstance(feed_forward, Dense):
        hidden = feed_forward.hidden
        both = Part("mlp.fc1.weight", (2 * hidden, width), True)
        yield ("feed_forward_norm", "weight"), Part("norm2.weight", (width,), False)
        yield ("feed_forward", "up"), both._replace(rows=(0, hidden))
        yield ("feed_forward", "gate"), both._replace(rows=(hidden, 2 * hidden))
        yield ("feed_forward", "down"), Part("mlp.fc2.weight", (width, hidden), True)


def _attention_parts(width: int) -> Iterator[tuple[str, Part]]:
    for i, name in enumerate("qkv"):
        yield name, Part("Wqkv.weight", (3 * width, width), True, (i * width, (i + 1) * width))
    yield "o", Part("out_proj.weight", (width, width), True)


def _mamba_parts(mixer: Mamba2, width: int) -> Iterator[tuple[str, Part]]:
    inner, pair, heads = mixer.expand * width, 2 * mixer.d_state, mixer.heads(width)
    channels = inner + pair
    rows = {"z": (0, inner), "x": (inner, 2 * inner), "bc": (2 * inner, inner + channels)}
    rows["dt"] = (inner + channels, inner + channels + heads)
    for name, place in rows.items():
        yield name, Part("in_proj.weight", (inner + channels + heads, width), True, place)
    for name, place in (("conv_x", (0, inner)), ("conv_bc", (inner, channels))):
        yield name, Part("conv1d.weight", (channels, 1, mixer.d_conv), True, place)
        yield f"{name}_bias", Part("conv1d.bias", (channels,), False, place)
    for name, theirs in (("dt_bias", "dt_bias"), ("a_log", "A_log"), ("d", "D")):
        yield name, Part(theirs, (heads,), False)
    yield "norm", Part("norm.weight", (inner,), False)
    yield "out", Part("out_proj.weight", (width, inner), True)


def foreign(settings: language_model.Settings) -> str:
    """What a released model has and one of these settings has not; empty where it fits."""
    body = settings.body
    while isinstance(body, hnet.Settings):
        if body.chunker.kind() != "dynamic":
            return f"has chunker=dynamic in every stage, not {body.chunker.kind()}"
        if body.merge != "boundary":
            return "has merge=boundary"
        body = body.inner
    if not isinstance(body, plain.Settings):
        return f"ends in a stack (body=plain), not {body.kind()}"
    if settings.norm_eps != NORM_EPS:
        return f"has norm_eps={NORM_EPS:g}"
    return next((why for stage in stages_of(settings) if (why := _foreign_stage(stage))), "")


def _foreign_stage(stage: Stage) -> str:
    parts = stage.parts()
    if any(own.stream != "float32" for own in stage.stacks):
        return "has stacks with stream=float32"
    if parts.feed_forward is not None and parts.feed_forward.hidden % SWIGLU_MULTIPLE:
        return f"has feed-forwards of a multiple of {SWIGLU_MULTIPLE} hidden units"
    attention = parts.attention
    if attention is not None:
        released = Attention(
            heads=attention.heads,
            head_dim=stage.width // attention.heads,
            rotary_dim=attention.rotated,
            rope_theta=ROPE_THETA,
            window=attention.window,
        )
        parts = parts._replace(attention=released)
    for block in (block for own in stage.stacks for block in own.blocks):
        if block.mixer is None or _without_defaults(block) != block_of(letter_of(block), parts):
            return (
                "has blocks of Mamba-2 or of attention, alone or with a dense feed-forward, of one shape in a stage, "
                f"and attention with a head of keys for each of queries and rope_theta={ROPE_THETA:g}"
            )
    return ""


def _without_defaults(block: Block) -> Block:
    """The block once, what its attention leaves to defaults written out."""
    mixer = block.mixer
    if isinstance(mixer, Attention):
        mixer = dataclasses.replace(mixer, kv_heads=0 if mixer.groups == mixer.heads else mixer.kv_heads)
        mixer = dataclasses.replace(mixer, rotary_dim=mixer.rotated)
    return dataclasses.replace(block, mixer=mixer, repeat=1)
