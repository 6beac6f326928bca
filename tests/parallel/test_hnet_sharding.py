"""H-Nets on every mesh: what one device computes, and no communication for chunks."""

import functools

import jax
import numpy as np
import pytest
import shapes
from flax import nnx
from meshes import (
    CONTEXT,
    CONTEXT_EXPERT,
    GRADIENT,
    MIXED,
    ONE,
    REPLICAS,
    ROWS,
    SEQ,
    VOCAB,
    assert_every_part_split,
    assert_recorded,
    assert_same_step,
    collectives,
    stepped,
)
from train_steps import compiled_step, packed_batch

from adaptive.layers import stack
from adaptive.layers.chunkers import dynamic
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.models.bodies import plain
from adaptive.models.depth import expert_choice

pytestmark = pytest.mark.compiles

ATTENDS = {"heads": 8, "kv_heads": 8, "head_dim": 4, "hidden": 32}
ONE_STAGE, TWO_STAGES = ("m1", ("T1",), "t1"), ("m1", ("t1", ("T1",), "m1"), "t1")


def hnet(layout=ONE_STAGE, *, widths=(16, 24), **settings) -> shapes.Model:
    own = {"heads": 8, "hidden": 32, "ssm_head_dim": 2, "vocab_size": VOCAB}
    return shapes.hnet(layout, widths=widths, **(own | settings))


def routed() -> stack.Settings:
    """Experts, with a bias that moves after every step."""
    layer = experts.Settings(token_choice.Settings(bias=True), experts=4, expert_size=16)
    return stack.Settings((shapes.block(**ATTENDS, feed_forward=layer),), stream="float32", scale_residual=True)


def recursive(**settings):
    return shapes.recursive(2, 2, ends=0, **ATTENDS, **settings).body


PLAIN = hnet(capacities=(0.5,))
RATIO = dynamic.Settings(target=3.0, ratio_coefficient=0.5)
MODELS = {
    "one stage": PLAIN,
    "device": hnet(TWO_STAGES, widths=(16, 16, 24), chunker=RATIO, merge="sum", packing="device"),
    "mor": hnet(("m1", recursive(depth=expert_choice.Settings(alpha=1.0)), "m1"), capacities=(0.6,)),
    "experts": hnet(("m1", plain.Settings(routed()), "m1")),
}
CASES = [
    ("one stage", REPLICAS), ("one stage", MIXED), ("device", CONTEXT), ("mor", CONTEXT),
    ("experts", CONTEXT_EXPERT),
]  # fmt: skip


@functools.cache
def on_one_device(name: str):
    return stepped(MODELS[name], ONE)


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_mesh_equals_one_device(name, mesh):
    """But for the ratio loss of each device, which depends on what a device holds."""
    assert_same_step(stepped(MODELS[name], mesh), on_one_device(name), but="ratio_loss_device")


def test_every_part_was_split_along_every_axis():
    assert_every_part_split(MODELS, CASES)


def test_a_ratio_loss_of_each_device():
    """The mean of what each device's rows alone would give; and the loss to train, where the recipe says so."""
    model = hnet(chunker=dynamic.Settings(target=3.0, ratio_over="device"))
    rows = 2  # of a device, where the batch is split in four
    program = compiled_step(model, GRADIENT, MIXED, ROWS, SEQ)
    state, batch = program.state(), packed_batch(ROWS, SEQ, VOCAB)
    graphdef = nnx.split(nnx.eval_shape(lambda: program.build(jax.random.key(0))))[0]
    params = jax.tree.map(np.asarray, state.params)
    trace = jax.jit(
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

COUNTED = {
    "hnet_none": (hnet(chunker="none", capacities=(0.5,)), REPLICAS),
    "hnet_stride": (hnet(chunker="stride", capacities=(0.5,)), REPLICAS),
    "hnet_dynamic": (PLAIN, REPLICAS),
    "hnet_device": (hnet(capacities=(0.5,), packing="device"), REPLICAS),
    "hnet_mixed": (PLAIN, MIXED),
}


def counted(name: str) -> dict[str, int]:
    return collectives(*COUNTED[name])


@pytest.mark.parametrize("name", COUNTED)
def test_number_of_collectives(name):
    assert_recorded(name, *COUNTED[name])


def test_chunks_do_not_travel():
    """With the batch alone split: sums, and no more of them than without chunks but for the two matrices of the router
    and the scalars of the ratio loss and its statistics."""
    none, stride, dynamic, device = (counted(f"hnet_{name}") for name in ("none", "stride", "dynamic", "device"))
    assert set(none) == set(stride) == set(dynamic) == set(device) == {"all-reduce"}
    assert stride == none
    assert dynamic["all-reduce"] - none["all-reduce"] <= 2 + 4 and device == dynamic
