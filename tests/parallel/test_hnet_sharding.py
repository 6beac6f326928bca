"""H-Nets on every mesh: what one device computes, and no communication for chunks."""

import dataclasses
import json
import os
from pathlib import Path

import hlo
import jax
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from train_steps import compiled_step, packed_batch

from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.models.hnet_config import HNetConfig

pytestmark = pytest.mark.compiles

ROWS, SEQ = 8, 16
RATE = 1e3  # parameters move so far that rounding them does not hide their gradient
GRADIENT = optax.sgd(RATE)
ONE = (1, 1, 1, 1)
REPLICAS, MIXED = (8, 1, 1, 1), (2, 2, 1, 2)  # data, fsdp, expert, tensor
MESHES = [REPLICAS, (1, 8, 1, 1), MIXED, (1, 1, 1, 8)]
COLLECTIVES = Path(__file__).with_name("collectives.json")
RECORD = "ADAPTIVE_RECORD=1 ./scripts/test tests/parallel/test_hnet_sharding.py -k collectives"


def hnet(layout: str, *, widths: tuple[int, ...] = (16, 24), router: RouterConfig | None = None, **settings):
    own = HNetConfig(
        layout=layout, widths=widths, intermediates=(32,), heads=(8,), rotary_dims=(2,), d_state=(4,),
        ssm_head_dim=(2,), ssm_block=(8,), ratio_targets=(3.0,), **settings,
    )  # fmt: skip
    config = TransformerConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=4,
        recursions=2, init_std=0.2, tie_embeddings=False, router=router or RouterConfig(), hnet=own,
    )  # fmt: skip
    config.validate()
    return config


PLAIN = hnet('["m1", ["T1"], "t1"]', capacities=(0.5,))
TWO = '["m1", ["t1", ["T1"], "m1"], "t1"]'
MODELS = {
    "one stage": PLAIN,
    "two stages": hnet(TWO, widths=(16, 16, 24), ratio_coefficient=0.5, merge="sum"),
    "device": hnet(TWO, widths=(16, 16, 24), packing="device"),
    "mor": hnet('["m1", ["model"], "m1"]', router=RouterConfig(kind="expert_choice", alpha=1.0), capacities=(0.6,)),
    "mor_token": hnet(
        '["t1", ["model"], "m1"]',
        router=RouterConfig(kind="token_choice", activation="softmax", alpha=1.0, balancing="loss_free"),
    ),
}
CASES = [
    *(("one stage", mesh) for mesh in MESHES),
    *((name, MIXED) for name in MODELS if name != "one stage"),
    ("device", REPLICAS),
]


def loss_and_gradients(name: str, mesh: tuple[int, int, int, int]):
    """(metrics, gradient of every parameter, buffers) of one step."""
    program = compiled_step(MODELS[name], GRADIENT, mesh, ROWS, SEQ)
    state = program.state()
    before = jax.tree.map(np.array, state.params)
    after, metrics = program.run(state, packed_batch(ROWS, SEQ, 64))
    grads = jax.tree.map(lambda a, b: (a - np.asarray(b)) / RATE, before, after.params)
    return jax.tree.map(np.asarray, metrics), grads, jax.tree.map(np.asarray, after.buffers)


@pytest.fixture(scope="module")
def on_one_device():
    return {name: loss_and_gradients(name, ONE) for name in MODELS}


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_mesh_equals_one_device(name, mesh, on_one_device):
    want_metrics, want_grads, want_buffers = on_one_device[name]
    metrics, grads, buffers = loss_and_gradients(name, mesh)
    assert metrics.keys() == want_metrics.keys() and metrics["loss"] > 0
    for key, value in want_metrics.items():
        if "ratio_loss_device" not in key:  # which depends on what a device holds
            np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=2e-6, err_msg=key)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(want_grads), jax.tree.leaves(grads), strict=True):
        scale = np.abs(want).max()
        assert scale > 0, path
        np.testing.assert_allclose(got, want, atol=3e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))
    for got, want in zip(jax.tree.leaves(buffers), jax.tree.leaves(want_buffers), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize(("mesh", "rows"), [(REPLICAS, 1), (MIXED, 2)], ids=str)
def test_a_ratio_loss_of_each_device(mesh, rows):
    """The mean of what each device's rows alone would give; and the loss to train, where the recipe says so."""
    config = dataclasses.replace(PLAIN, hnet=dataclasses.replace(PLAIN.hnet, ratio_over="device", capacities=()))
    program = compiled_step(config, GRADIENT, mesh, ROWS, SEQ)
    state, batch = program.state(), packed_batch(ROWS, SEQ, 64)
    graphdef = nnx.split(nnx.eval_shape(lambda: program.build(jax.random.key(0))))[0]
    params = jax.tree.map(np.asarray, state.params)
    trace = quick.jit(
        lambda params: nnx.merge(graphdef, params)(batch.tokens, segment_ids=batch.segment_ids).trace,
    )(params)
    f, g = (
        np.asarray(a, np.float64).reshape(-1, rows * SEQ).mean(1)
        for a in (trace.stages[0].boundary_mask, trace.stages[0].boundary_prob)
    )
    each = 1.5 * (2 * f * g + (1 - f) * (1 - g))
    _, metrics = program.run(state, batch)
    assert float(metrics["aux/ratio_loss_0"]) == pytest.approx(each.mean(), rel=1e-5)
    assert float(metrics["routing/ratio_loss_device_0"]) == pytest.approx(each.mean(), rel=1e-5)
    assert abs(float(metrics["routing/ratio_loss_global_0"]) - each.mean()) > 1e-4
    assert float(metrics["loss"]) == pytest.approx(float(metrics["ce"]) + 0.03 * each.mean(), rel=1e-5)


# Communication


def chunked(chunker: str, **settings) -> TransformerConfig:
    return dataclasses.replace(PLAIN, hnet=dataclasses.replace(PLAIN.hnet, chunkers=(chunker,), **settings))


COUNTED = {
    "hnet_none": (chunked("none"), REPLICAS),
    "hnet_stride": (chunked("stride"), REPLICAS),
    "hnet_dynamic": (chunked("dynamic"), REPLICAS),
    "hnet_device": (chunked("dynamic", packing="device"), REPLICAS),
    "hnet_mixed": (chunked("dynamic"), MIXED),
}


def counted(name: str) -> dict[str, int]:
    config, mesh = COUNTED[name]
    return hlo.collectives(compiled_step(config, GRADIENT, mesh, ROWS, SEQ).compiled.as_text())


@pytest.mark.parametrize("name", COUNTED)
def test_number_of_collectives(name):
    """By kind, in the compiled step; other jax versions compile other programs."""
    version = ".".join(jax.__version__.split(".")[:2])
    found, recorded = counted(name), json.loads(COLLECTIVES.read_text())
    if os.environ.get("ADAPTIVE_RECORD"):
        recorded.setdefault(version, {})[name] = found
        COLLECTIVES.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
        return
    if version not in recorded:
        pytest.skip(f"collectives are not recorded for jax {version}; {RECORD} records them")
    assert found == recorded[version][name], f"if the change is meant, explain it in the commit and run:\n  {RECORD}"


def test_chunks_do_not_travel():
    """With the batch alone split: sums, and no more of them than without chunks but for the two matrices of the router
    and the scalars of the ratio loss and its statistics."""
    none, stride, dynamic, device = (counted(f"hnet_{name}") for name in ("none", "stride", "dynamic", "device"))
    assert set(none) == set(stride) == set(dynamic) == set(device) == {"all-reduce"}
    assert stride == none
    assert dynamic["all-reduce"] - none["all-reduce"] <= 2 + 4 and device == dynamic
