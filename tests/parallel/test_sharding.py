"""Every mesh computes what one device computes, with the collectives that were recorded."""

import dataclasses
import json
import os
from pathlib import Path

import hlo
import jax
import numpy as np
import optax
import pytest
from train_steps import RULES, compiled_step, packed_batch

from adaptive.errors import MeshError
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, constrain, placement
from adaptive.runs.state import state_shardings

pytestmark = pytest.mark.compiles

ROWS, SEQ = 8, 16
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 1, 1, 8)]  # data, fsdp, expert, tensor
WITH_EXPERTS = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2)]
GRADIENT = optax.sgd(1.0)  # parameters move by exactly their gradient
COLLECTIVES = Path(__file__).with_name("collectives.json")
RECORD = "ADAPTIVE_RECORD=1 ./scripts/test tests/parallel/test_sharding.py -k collectives"

VANILLA = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=4,
    init_std=0.1,
)  # fmt: skip
MODELS = {
    "vanilla": VANILLA,
    "olmo": dataclasses.replace(VANILLA, attention_bias=True, qk_norm="full", clip_qkv=1.5, attention_window=6),
    "recursive": dataclasses.replace(VANILLA, recursions=2),
    "mor": dataclasses.replace(VANILLA, recursions=2, router=RouterConfig(kind="expert_choice")),
    "mor_token": dataclasses.replace(
        VANILLA, recursions=2, sharing="cycle",
        router=RouterConfig(kind="token_choice", activation="softmax", alpha=1.0, balancing="loss_free"),
    ),
    "moe": dataclasses.replace(VANILLA, num_layers=2, moe=MoEConfig("expert_choice", expert_size=16)),
    "moe_token": dataclasses.replace(VANILLA, num_layers=2, moe=MoEConfig("token_choice", expert_size=16)),
}  # fmt: skip


def loss_and_gradients(name: str, mesh: tuple[int, int, int, int]):
    """(metrics, gradient of every parameter, buffers) of one step."""
    program = compiled_step(MODELS[name], GRADIENT, mesh, ROWS, SEQ)
    state = program.state()
    before = jax.tree.map(np.array, state.params)
    after, metrics = program.run(state, packed_batch(ROWS, SEQ, VANILLA.vocab_size))
    grads = jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params)
    return jax.tree.map(np.asarray, metrics), grads, jax.tree.map(np.asarray, after.buffers)


@pytest.fixture(scope="module")
def on_one_device():
    return {name: loss_and_gradients(name, (1, 1, 1, 1)) for name in MODELS}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh)
        for name, model in MODELS.items()
        for mesh in (MESHES if model.moe.router == "none" else WITH_EXPERTS)
    ],
    ids=str,
)
def test_mesh_equals_one_device(name, mesh, on_one_device):
    want_metrics, want_grads, want_buffers = on_one_device[name]
    metrics, grads, buffers = loss_and_gradients(name, mesh)
    assert metrics.keys() == want_metrics.keys()
    for key, value in want_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(want_grads), jax.tree.leaves(grads), strict=True):
        scale = np.abs(want).max()
        assert scale > 0, path
        np.testing.assert_allclose(got, want, atol=2e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))
    for got, want in zip(jax.tree.leaves(buffers), jax.tree.leaves(want_buffers), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_parameters_and_moments_are_born_split():
    program = compiled_step(MODELS["mor"], GRADIENT, (2, 2, 1, 2), ROWS, SEQ)
    block = program.state().params["block"]
    attention, feed_forward = block["attention"], block["feed_forward"]
    for variable, split in ((feed_forward["up"], 4), (attention["q"], 4), (block["attention_norm"]["weight"], 1)):
        value = variable.get_value()
        assert {shard.data.size for shard in value.addressable_shards} == {value.size // split}


@pytest.mark.parametrize("name", ["vanilla", "recursive", "mor"])
def test_number_of_collectives(name):
    """By kind, in the compiled step on data=2 fsdp=2 tensor=2; other jax versions compile other programs."""
    version = ".".join(jax.__version__.split(".")[:2])
    program = compiled_step(MODELS[name], GRADIENT, (2, 2, 1, 2), ROWS, SEQ)
    found = hlo.collectives(program.compiled.as_text())
    recorded = json.loads(COLLECTIVES.read_text())
    if os.environ.get("ADAPTIVE_RECORD"):
        recorded.setdefault(version, {})[name] = found
        COLLECTIVES.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
        return
    if version not in recorded:
        pytest.skip(f"collectives are not recorded for jax {version}; {RECORD} records them")
    assert found == recorded[version][name], f"if the change is meant, explain it in the commit and run:\n  {RECORD}"


@pytest.mark.parametrize("name", MODELS)
def test_replicas_communicate_by_sums_alone(name):
    """With the batch alone split, nothing is gathered: routing is local to a sequence."""
    program = compiled_step(MODELS[name], GRADIENT, (8, 1, 1, 1), ROWS, SEQ)
    assert set(hlo.collectives(program.compiled.as_text())) == {"all-reduce"}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (MeshConfig(data=3), ["data=3", "does not fit 8 devices", "1, 2, 4, 8"]),
        (MeshConfig(data=1, fsdp=2, tensor=2), ["fsdp=2 * tensor=2", "must equal 8"]),
        (MeshConfig(tensor=3), ["tensor=3", "must divide 8", "1, 2, 4, 8"]),
        (MeshConfig(data=-1, fsdp=-1), ["mesh.data and mesh.fsdp", "only one"]),
        (MeshConfig(fsdp=0), ["mesh.fsdp=0", "at least 1"]),
    ],
)
def test_sizes_that_do_not_fit_the_devices(config, parts):
    with pytest.raises(MeshError) as error:
        make_mesh(config)
    for part in parts:
        assert part in str(error.value)


def test_sizes_that_fit():
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def test_parameters_that_do_not_divide_are_named():
    config = dataclasses.replace(VANILLA, num_heads=6, num_kv_heads=2)
    build = lambda key: build_model(config, key=key)  # noqa: E731
    with pytest.raises(MeshError) as error:
        state_shardings(build, GRADIENT, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), RULES)
    message = str(error.value)
    assert "['attention']['q']" in message and "heads=6 does not divide by tensor=4" in message
    assert "['attention']['k']" in message and "heads=2" in message
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
