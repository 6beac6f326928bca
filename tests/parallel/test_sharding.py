"""Every mesh computes what one device computes, with the collectives that were recorded."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
import shapes
from meshes import (
    CONTEXT,
    CONTEXT_EXPERT,
    GRADIENT,
    MIXED,
    MIXED_EXPERT,
    ONE,
    REPLICAS,
    ROWS,
    SEQ,
    SIZES,
    TENSOR,
    VOCAB,
    assert_every_part_split,
    assert_recorded,
    assert_same_step,
    stepped,
)
from train_steps import RULES, compiled_step, packed_batch

from adaptive.data.tokenizers import ByteCounts
from adaptive.errors import MeshError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.models.depth import expert_choice as depth_expert_choice
from adaptive.models.depth import token_choice as depth_token_choice
from adaptive.objectives import block_diffusion, masked_diffusion
from adaptive.parallel.config import AXES, MeshConfig
from adaptive.parallel.mesh import batch_sharding, make_mesh
from adaptive.parallel.rules import AxisRules, constrain, placement
from adaptive.parallel.support import UNSUPPORTED, check_support
from adaptive.runs.state import abstract_model, fresh_state, state_shardings
from adaptive.training.step import make_eval_step

pytestmark = pytest.mark.compiles

ATTENDS = {"heads": 8, "kv_heads": 8, "head_dim": 4}
SHAPE = ATTENDS | {"hidden": 64, "vocab_size": VOCAB, "init_std": 0.1, "embedding_std": 0.1}


def routed(router) -> experts.Settings:
    return experts.Settings(router, expert_size=16)


BIASED = token_choice.Settings(bias=True)
LOSS_FREE = depth_token_choice.Settings(balancing="loss_free")
UNEVEN = depth_expert_choice.Settings(capacities=(1.0, 0.45))  # 7 of 16, which two devices cannot share
MODELS = {
    "vanilla": shapes.plain(4, **SHAPE),
    "olmo": shapes.plain(4, **SHAPE, bias="all", qk_norm="full", clip_qkv=1.5, window=6),
    "recursive": shapes.recursive(4, 2, **SHAPE),
    "mor": shapes.mor(4, 2, **SHAPE),
    "mor_token": shapes.mor(4, 2, LOSS_FREE, ends=0, **SHAPE),
    "mor_mamba": shapes.mor(2, 2, UNEVEN, ends=0, pattern=[shapes.block(mixer="mamba2", **ATTENDS)], **SHAPE),
    "mod": shapes.recursive(2, 2, ends=0, depth="mixture_of_depths", **SHAPE),
    "moe": shapes.plain(2, feed_forward=routed(expert_choice.Settings()), **SHAPE),
    "moe_token": shapes.plain(2, feed_forward=routed(BIASED), **SHAPE),
    "mor_moe": shapes.mor(
        2, 2, ends=0, shared="mixers", pattern=[shapes.block(feed_forward=routed(BIASED), **ATTENDS)], **SHAPE
    ),
}
CASES = [
    ("vanilla", MIXED), ("vanilla", TENSOR), ("olmo", CONTEXT), ("recursive", MIXED), ("recursive", CONTEXT),
    ("mor", MIXED), ("mor_token", CONTEXT), ("mor_mamba", CONTEXT), ("mod", CONTEXT), ("moe", CONTEXT_EXPERT),
    ("moe_token", REPLICAS), ("mor_moe", CONTEXT_EXPERT),
]  # fmt: skip


@functools.cache
def on_one_device(name: str):
    return stepped(MODELS[name], ONE)


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_mesh_equals_one_device(name, mesh):
    assert_same_step(stepped(MODELS[name], mesh), on_one_device(name))


FILLED = dataclasses.replace(expert_choice.Settings(), score="selected", decode="refuse")
DIFFUSION = {
    # Hidden tokens are alike but for their places, which experts that choose among them must see.
    "experts": (
        shapes.plain(1, feed_forward=routed(FILLED), positions=SEQ, **SHAPE),
        masked_diffusion.Settings(mask_id=VOCAB - 1),
    ),
    "blocks": (
        MODELS["vanilla"],
        block_diffusion.Settings(mask_id=VOCAB - 1, block=3, draws="antithetic", complementary=True),
    ),
}


@pytest.mark.parametrize(("name", "mesh"), [("experts", (2, 1, 2, 2)), ("blocks", CONTEXT)], ids=str)
def test_what_is_hidden_and_its_loss_are_those_of_one_device(name, mesh):
    model, objective = DIFFUSION[name]
    assert_same_step(stepped(model, mesh, objective), stepped(model, ONE, objective))


def evaluated(name: str, mesh: tuple[int, ...], selection: str):
    """(sums of the loss and tokens, each token's loss and depth) of a batch."""
    program = compiled_step(MODELS[name], GRADIENT, mesh, ROWS, SEQ)
    state, graphdef = program.state(), abstract_model(program.build)[0]
    step = make_eval_step(graphdef, ByteCounts(jnp.ones(VOCAB, jnp.int32)), selection=selection)
    with placement(program.mesh, RULES):
        batch = jax.device_put(packed_batch(ROWS, SEQ, VOCAB), batch_sharding(program.mesh, RULES))
        found = jax.jit(step)(state.params, state.buffers, batch, jax.random.key(0))
    return jax.device_get((found.nll, found.tokens, found.token_nll, found.depth))


def test_evaluation_of_split_sequences():
    """By the routers' own decisions, which training does not take."""
    got, want = (evaluated("mor_mamba", mesh, "threshold") for mesh in (CONTEXT, ONE))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "mesh"), [case for case in CASES if len(case[1]) == len(SIZES)], ids=str)
def test_activations_are_not_gathered_along_the_sequence(name, mesh):
    """Of whole rows there are numbers by position, and keys and values where they are small."""
    rows = ROWS // math.prod(mesh[:3])
    text = compiled_step(MODELS[name], GRADIENT, mesh, ROWS, SEQ).compiled.as_text()
    gathered = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
    assert gathered and not [found for found in gathered if f"[{rows},{SEQ},{MODELS[name].width}]" in found]


def test_every_part_was_split_along_every_axis():
    assert_every_part_split(MODELS, CASES)


@pytest.mark.parametrize("one", UNSUPPORTED, ids=str)
def test_what_cannot_be_split_is_refused_with_its_reason(one):
    beside = {one.beside: 2} if one.beside in AXES else {}
    with pytest.raises(MeshError, match=re.escape(one.reason)):
        check_support({one.axis: 2, **beside}, {one.beside})
    assert one.reason in (Path(__file__).parents[2] / "docs/sharding.md").read_text().replace("\n", " ")


def test_parameters_and_moments_are_born_split():
    """Those of several layers or passes along the axes of one, norms and buffers nowhere."""
    sizes = dict(zip(("data", "fsdp", "expert", "tensor"), MIXED_EXPERT, strict=True))
    build, tx, mesh = MODELS["mor_moe"].build, optax.adam(1e-3), make_mesh(MeshConfig(**sizes))
    state = fresh_state(build, tx, jax.random.key(0), mesh, RULES, state_shardings(build, tx, mesh, RULES))
    for tree in (state.params, state.opt[0].mu):
        core = tree["body"]["core"]["blocks"][0]
        for variable, axes in (
            (core["feed_forward"]["experts"]["up"], (None, None, "expert", "fsdp", "tensor")),
            (core["mixer"]["q"], (None, "fsdp", "tensor", None)),
            (core["mixer_norm"]["weight"], (None, None)),
        ):
            value = variable.get_value()
            part = tuple(size // sizes.get(axis, 1) for size, axis in zip(value.shape, axes, strict=True))
            assert {shard.data.shape for shard in value.addressable_shards} == {part}
    assert jax.tree.leaves(state.buffers)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.buffers))


@pytest.mark.parametrize("name", ["vanilla", "recursive", "mor"])
def test_number_of_collectives(name):
    """By kind, and the bytes that they move, on data=2 fsdp=2 tensor=2."""
    assert_recorded(name, MODELS[name], MIXED)


@pytest.mark.parametrize("name", ["mor", "mor_token", "moe", "moe_token"])
def test_replicas_communicate_by_sums_alone(name):
    """With the batch alone split, nothing is gathered: routing is local to a sequence."""
    assert set(meshes.collectives(MODELS[name], REPLICAS)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (MeshConfig(data=3), ["data=3", "does not fit 8 devices", "1, 2, 4, 8"]),
        (MeshConfig(data=1, fsdp=2, tensor=2), ["fsdp=2 * tensor=2", "must equal 8"]),
        (MeshConfig(tensor=3), ["tensor=3", "must divide 8", "1, 2, 4, 8"]),
        (MeshConfig(data=-1, fsdp=-1), ["mesh.data and mesh.fsdp", "only one"]),
        (MeshConfig(fsdp=0), ["mesh.fsdp=0", "at least 1"]),
        (MeshConfig(slices=3), ["mesh.slices=3", "8 devices", "1, 2, 4, 8"]),
        (MeshConfig(tensor=4, slices=4), ["mesh.slices=4", "2 devices", "1, 2"]),
    ],
)
def test_sizes_that_do_not_fit_the_devices(config, parts):
    with pytest.raises(MeshError) as error:
        make_mesh(config)
    for part in parts:
        assert part in str(error.value)


def test_sizes_that_fit():
    ones = dict.fromkeys(AXES, 1)
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == ones | {"data": 4, "fsdp": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == ones
    assert dict(make_mesh(MeshConfig(data=1, context=-1, stage=2)).shape) == ones | {"context": 4, "stage": 2}


def test_parameters_that_do_not_divide_are_named():
    model = shapes.plain(4, **SHAPE | {"heads": 6, "kv_heads": 2})
    with pytest.raises(MeshError) as error:
        state_shardings(model.build, GRADIENT, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), RULES)
    message = str(error.value)
    assert "['mixer']['q']" in message and "heads=6 does not divide by tensor=4" in message
    assert "['mixer']['k']" in message and "heads=2" in message
    assert "sizes that divide it: 1, 2, 3, 6" in message and "embedding" not in message


def test_the_table_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match="not in the table"):
        RULES.spec("depth")
    with pytest.raises(ValueError, match="two dimensions"):
        AxisRules(seq=("tensor",)).spec("seq", "heads")


def test_annotations_are_void_without_a_mesh():
    x = np.ones((4, 4), np.float32)
    assert constrain(x, "batch", "heads") is x
    with placement(make_mesh(MeshConfig(data=4, tensor=2)), RULES):
        assert jax.jit(lambda x: constrain(x, "batch", "heads"))(x).sharding.shard_shape((4, 4)) == (1, 2)
