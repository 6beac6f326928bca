"""The train step: accumulation, skipped steps, clipping, schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import nnx
from train_steps import compiled_step, packed_batch

from adaptive.layers.moe_config import MoEConfig
from adaptive.models.build import build_model
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.optim.build import decayed, make_optimizer
from adaptive.optim.config import OptimizerConfig, ScheduleConfig
from adaptive.optim.schedule import make_schedule, phases
from adaptive.runs.state import abstract_model

ROWS, SEQ, ONE = 4, 8, (1, 1, 1, 1)
GRADIENT = optax.sgd(1.0)
VANILLA = TransformerConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    init_std=0.2,
)  # fmt: skip
LOSS_FREE = RouterConfig(kind="token_choice", activation="softmax", alpha=1.0, balancing="loss_free")
TOKEN = dataclasses.replace(VANILLA, recursions=2, sharing="cycle", router=LOSS_FREE)
EXPERTS = dataclasses.replace(VANILLA, moe=MoEConfig("expert_choice", experts=4, expert_size=12))
ADAM = make_optimizer(OptimizerConfig(), ScheduleConfig(kind="constant"), 10)


def numpy_of(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def one_step(accumulation: int):
    program = compiled_step(VANILLA, GRADIENT, ONE, ROWS, SEQ, accumulation)
    after, metrics = program.run(program.state(), packed_batch(ROWS, SEQ, 32))
    return numpy_of(after), numpy_of(metrics)


def test_loss_is_the_mean_over_counted_targets():
    batch = packed_batch(ROWS, SEQ, 32)
    program = compiled_step(VANILLA, GRADIENT, ONE, ROWS, SEQ)
    graphdef, _ = abstract_model(lambda key: build_model(VANILLA, key=key))

    @quick.jit
    def logits_of(params, batch):
        model = nnx.merge(graphdef, params)
        return model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids).logits

    logits = logits_of(program.state().params, batch)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    assert 0 < batch.mask.sum() < batch.mask.size
    _, metrics = one_step(1)
    np.testing.assert_allclose(metrics["loss"], (nll * batch.mask).sum() / batch.mask.sum(), rtol=1e-5)
    assert metrics["target_tokens"] == batch.mask.sum() and metrics["skipped"] == 0


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    (want, want_metrics), (got, metrics) = one_step(1), one_step(accumulation)
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], want_metrics["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    program = compiled_step(TOKEN, ADAM, ONE, ROWS, SEQ)
    batch = packed_batch(ROWS, SEQ, 32)
    state, _ = program.run(program.state(), batch)
    before = numpy_of(state)
    assert np.any(jax.tree.leaves(before.buffers)[0]), "the bias should have moved"
    mask = batch.mask.copy()
    mask[0, 0] = bad
    after, metrics = program.run(state, batch._replace(mask=mask))
    assert metrics["skipped"] == 1 and int(after.skipped) == 1 and int(after.step) == 2
    for part in ("params", "buffers", "opt", "key"):
        for a, b in zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(before, part)), strict=True):
            np.testing.assert_array_equal(a, b)
    again, metrics = program.run(after, batch)
    assert metrics["skipped"] == 0 and int(again.skipped) == 1
    assert any(
        np.any(np.asarray(a) != b)
        for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(before.params), strict=True)
    )


def test_a_router_that_is_not_a_number_skips_the_step():
    program = compiled_step(EXPERTS, ADAM, ONE, ROWS, SEQ)
    state = program.state()

    def broken(path, a):
        return a.at[0].set(np.nan) if "router" in jax.tree_util.keystr(path) else a

    state = state._replace(params=jax.tree_util.tree_map_with_path(broken, state.params))
    before = numpy_of(state)
    after, metrics = program.run(state, packed_batch(ROWS, SEQ, 32))
    assert metrics["skipped"] == 1 and int(after.skipped) == 1
    for part in ("params", "buffers", "opt"):
        for a, b in zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(before, part)), strict=True):
            np.testing.assert_array_equal(a, b)


def small_params(auxiliary: bool):
    router = RouterConfig(kind="expert_choice", sampling="aux_router" if auxiliary else "aux_loss")
    config = dataclasses.replace(VANILLA, recursions=2, sharing="cycle", router=router)
    return nnx.state(build_model(config, key=jax.random.key(0)), nnx.Param)


def test_auxiliary_routers_are_clipped_apart():
    """A huge gradient of one group leaves the other group's update as it is."""
    params = small_params(auxiliary=True)
    tx = make_optimizer(OptimizerConfig(weight_decay=0.0, eps=1.0, clip_norm=1.0), ScheduleConfig(kind="constant"), 10)

    def updates(main: float, auxiliary: float):
        scale = lambda path, p: p * 0 + (auxiliary if "aux_routers" in jax.tree_util.keystr(path) else main)  # noqa: E731
        out, _ = tx.update(jax.tree_util.tree_map_with_path(scale, params), tx.init(params), params)
        return numpy_of(out)

    calm, shaken, main_shaken = updates(1e-4, 1e-4), updates(1e-4, 1e4), updates(1e4, 1e-4)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(calm), jax.tree.leaves(shaken), jax.tree.leaves(main_shaken), strict=True
    ):
        same, moved = (c, b) if "aux_routers" in jax.tree_util.keystr(path) else (b, c)
        np.testing.assert_array_equal(a, same)
        assert np.any(a != moved)


def test_norms_alone_are_not_decayed():
    params = small_params(auxiliary=False)
    flags = {jax.tree_util.keystr(p): f for p, f in jax.tree_util.tree_leaves_with_path(decayed(params))}
    kept = {name for name, decay in flags.items() if not decay}
    assert kept and all("norm" in name for name in kept)
    assert len(kept) == 3 and any("embedding" in n for n in flags.keys() - kept)
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), ScheduleConfig(kind="constant"), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        decay = 0.0 if jax.tree_util.keystr(path) in kept else 0.05
        np.testing.assert_allclose(update, -decay * param, rtol=1e-5, atol=1e-9)


def test_trapezoid_of_the_published_runs():
    """Steps and decay of the 360M runs (released configurations): vanilla 9438 and 1888, MoR 14161 and 2832."""
    config = ScheduleConfig(kind="trapezoid", warmup_steps=57)
    assert phases(config, 9438) == (57, 1888)
    assert phases(dataclasses.replace(config, warmup_steps=86), 14161) == (86, 2832)
    rate = make_schedule(config, 3e-3, 9438)
    for t, share in [(0, 0), (1, 1 / 57), (56, 56 / 57), (57, 1), (7550, 1), (7551, 1 - 1 / 1888), (9437, 1 / 1888)]:
        assert float(rate(t)) == pytest.approx(3e-3 * share, rel=1e-4), t


def test_cosine_ends_at_its_floor():
    rate = make_schedule(ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1), 2.0, 110)
    for t, value in [(0, 0), (5, 1), (10, 2), (60, 1.1), (35, 0.2 + 0.9 * (1 + 2**-0.5)), (110, 0.2), (200, 0.2)]:
        assert float(rate(t)) == pytest.approx(value, rel=1e-5), t


def test_a_short_run_shortens_its_warm_up():
    assert phases(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 10) == (8, 2)
    rate = make_schedule(ScheduleConfig(warmup_steps=100, decay_fraction=0.2), 1.0, 10)
    assert [round(float(rate(t)), 4) for t in (0, 4, 8, 9, 10)] == [0, 0.5, 1, 0.5, 0]
