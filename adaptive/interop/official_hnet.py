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

Linear weights are [out, in]. Here equal blocks in a row are stacked, and heads have an axis.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.official_hnet_config import NORM_EPS, ROPE_THETA, config_from_official
from adaptive.interop.tensors import Layout, Leaf, Part, Path, built, checked, parts_of, taken_apart
from adaptive.layers.layout import Blocks, BlockShape, Run
from adaptive.models.config import TransformerConfig
from adaptive.models.hnet import HNet

KIND = "hnet"
_HEAD, _EMBEDDING = "lm_head.weight", "embeddings.weight"


def from_official(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> HNet:
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
    if not isinstance(model, HNet):
        raise CheckpointError(
            f"official {KIND}: a {type(model).__name__} has no official names of this kind, only an HNet has"
        )
    if why := _foreign(model.config):
        raise CheckpointError(f"official {KIND}: a released model {why}, this one differs")
    return taken_apart(model, official_layout(model.config))


def official_layout(config: TransformerConfig) -> Layout:
    """Where each parameter of `HNet(config)` lies among the official tensors."""
    hnet, vocab = config.hnet, (config.vocab_size, config.hnet.shape(0).width)
    found: Layout = {("embedding",): _one(_EMBEDDING, vocab)}
    if not config.tie_embeddings:
        found["head",] = _one(_HEAD, vocab)
    layout, prefix, outside = hnet.parsed(), "backbone", 0
    for s in range(layout.stages):
        shape = hnet.shape(s)
        found |= _stack_leaves(("stages", s, "encoder"), f"{prefix}.encoder", layout.encoders[s], shape)
        found |= _stack_leaves(("stages", s, "decoder"), f"{prefix}.decoder", layout.decoders[s], shape)
        square = (shape.width, shape.width)
        for x in "qk":
            found["stages", s, "chunker", x] = _one(f"{prefix}.routing_module.{x}_proj_layer.weight", square, True)
        found["stages", s, "residual", "weight"] = _one(f"{prefix}.residual_proj.weight", square, True)
        found["stages", s, "residual", "bias"] = _one(f"{prefix}.residual_proj.bias", square[:1])
        if 0 < outside < shape.width:
            found["stages", s, "pad"] = _one(f"{prefix}.pad_dimension", (shape.width - outside,))
        outside, prefix = shape.width, f"{prefix}.main_network"
    shape = hnet.shape(layout.stages)
    if 0 < outside < shape.width:
        found["main_pad",] = _one(f"{prefix}.pad_dimension", (shape.width - outside,))
    return found | _stack_leaves(("main",), f"{prefix}.main_network", layout.main, shape)


def _one(name: str, shape: tuple[int, ...], transposed: bool = False) -> Leaf:
    return Leaf((), (Part(name, shape, transposed),))


def _stack_leaves(path: Path, prefix: str, blocks: Blocks, shape: BlockShape) -> Layout:
    """The parameters of a stack; each run of equal blocks is one stacked block of ours."""
    found: Layout = {(*path, "norm", "weight"): _one(f"{prefix}.rmsnorm.weight", (shape.width,))}
    first = 0
    for r, run in enumerate(blocks):
        layers = [f"{prefix}.layers.{i}" for i in range(first, first + run.count)]
        first += run.count
        for inner, part in _block_parts(run, shape):
            parts = tuple(part._replace(name=f"{layer}.{part.name}") for layer in layers)
            found[(*path, "runs", r, *inner)] = Leaf((run.count,), parts)
    return found


def _block_parts(run: Run, shape: BlockShape) -> Iterator[tuple[Path, Part]]:
    """(path in a Block, official tensor) of each parameter of one block."""
    width, hidden = shape.width, shape.feed_forward
    yield ("norm", "weight"), Part("norm1.weight", (width,), False)
    for name, part in _attention_parts(shape) if run.attends else _mamba_parts(shape):
        yield ("mixer", name), part._replace(name=f"mixer.{part.name}")
    if run.has_feed_forward:
        both = Part("mlp.fc1.weight", (2 * hidden, width), True)
        yield ("feed_forward_norm", "weight"), Part("norm2.weight", (width,), False)
        yield ("feed_forward", "up"), both._replace(rows=(0, hidden))
        yield ("feed_forward", "gate"), both._replace(rows=(hidden, 2 * hidden))
        yield ("feed_forward", "down"), Part("mlp.fc2.weight", (width, hidden), True)


def _attention_parts(shape: BlockShape) -> Iterator[tuple[str, Part]]:
    width = shape.width
    for i, name in enumerate("qkv"):
        yield name, Part("Wqkv.weight", (3 * width, width), True, (i * width, (i + 1) * width))
    yield "o", Part("out_proj.weight", (width, width), True)


def _mamba_parts(shape: BlockShape) -> Iterator[tuple[str, Part]]:
    inner, pair = shape.expand * shape.width, 2 * shape.d_state
    heads, channels = inner // shape.ssm_head_dim, inner + pair
    rows = {"z": (0, inner), "x": (inner, 2 * inner), "bc": (2 * inner, inner + channels)}
    rows["dt"] = (inner + channels, inner + channels + heads)
    for name, place in rows.items():
        yield name, Part("in_proj.weight", (inner + channels + heads, shape.width), True, place)
    for name, place in (("conv_x", (0, inner)), ("conv_bc", (inner, channels))):
        yield name, Part("conv1d.weight", (channels, 1, shape.d_conv), True, place)
        yield f"{name}_bias", Part("conv1d.bias", (channels,), False, place)
    for name, theirs in (("dt_bias", "dt_bias"), ("a_log", "A_log"), ("d", "D")):
        yield name, Part(theirs, (heads,), False)
    yield "norm", Part("norm.weight", (inner,), False)
    yield "out", Part("out_proj.weight", (shape.width, inner), True)


def _foreign(c: TransformerConfig) -> str:
    """What a released model has and one of this configuration has not; empty where it fits."""
    hnet = c.hnet
    if hnet.parsed().house:
        return 'ends in blocks (model.hnet.layout without "model")'
    if others := [hnet.chunker(s) for s in range(hnet.stages) if hnet.chunker(s) != "dynamic"]:
        return f"has model.hnet.chunkers=dynamic, not {others[0]}"
    if hnet.merge != "boundary":
        return "has model.hnet.merge=boundary"
    if c.norm_eps != NORM_EPS or c.rope_theta != ROPE_THETA:
        return f"has model.norm_eps={NORM_EPS:g} and model.rope_theta={ROPE_THETA:g}"
    return ""
