"""The train step: accumulation, skipped steps, clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from flax import nnx
from train_steps import compiled_step, packed_batch

from adaptive.data.batch import Batch
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice as experts_choose
from adaptive.layers.moe.routers import token_choice as routers
from adaptive.models.depth import expert_choice, token_choice
from adaptive.optim.build import make_optimizer
from adaptive.optim.config import ScheduleConfig
from adaptive.optim.named import chosen
from adaptive.optim.optimizers import adamw
from adaptive.runs.state import abstract_model
from adaptive.training.step import make_train_step

pytestmark = pytest.mark.compiles

ROWS, SEQ, ONE = 4, 8, (1, 1, 1, 1)
GRADIENT = optax.sgd(1.0)
SHAPE = {"vocab_size": 32, "width": 16, "hidden": 24, "heads": 2, "kv_heads": 1}
VANILLA = shapes.plain(2, **SHAPE)
TOKEN = shapes.mor(2, 2, token_choice.Settings(balancing="loss_free"), ends=0, **SHAPE)
EXPERTS = shapes.plain(2, feed_forward=experts.Settings(experts_choose.Settings(), experts=4, expert_size=12), **SHAPE)
ROUTER = routers.Settings(balance="switch", balance_coefficient=0.5, z_coefficient=0.3)
DEPTH = token_choice.Settings(balancing="loss", balance_coefficient=0.5, z_coefficient=0.1)
LOSSES = shapes.mor(2, 2, DEPTH, ends=0, feed_forward=experts.Settings(ROUTER, experts=4, expert_size=6), **SHAPE)
ADAM = make_optimizer(adamw.Settings(), ScheduleConfig(kind="constant"), 10)


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
    graphdef, _ = abstract_model(VANILLA.build)

    @jax.jit
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


def topics() -> Batch:
    """Rows of different tokens and of different lengths."""
    batch = packed_batch(ROWS, SEQ, 8)
    own = lambda tokens: tokens + 8 * np.arange(ROWS, dtype=np.int32)[:, None]  # noqa: E731
    there = np.arange(SEQ) < np.array([[SEQ], [2], [5], [3]])
    return batch._replace(
        tokens=own(batch.tokens),
        targets=own(batch.targets),
        segment_ids=np.where(there, batch.segment_ids, 0),
        mask=np.where(there, batch.mask, 0).astype(np.float32),
    )


def test_auxiliary_losses_are_of_the_whole_batch():
    """Products of means over rows that differ, some of them mostly padding."""

    def once(accumulation):
        program = compiled_step(LOSSES, GRADIENT, ONE, ROWS, SEQ, accumulation)
        after, metrics = program.run(program.state(), topics())
        return numpy_of(after), numpy_of(metrics)

    (want, want_metrics), (got, metrics) = once(1), once(4)
    names = [name for name in want_metrics if name.startswith("aux/")]
    assert len(names) == 4
    for name in [*names, "loss", "grad_norm"]:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_what_routers_report_is_the_mean_over_micro_batches():
    once, twice = (compiled_step(TOKEN, GRADIENT, ONE, ROWS, SEQ, accumulation) for accumulation in (1, 2))
    want, got = (program.run(program.state(), topics())[1] for program in (once, twice))
    named = [name for name in want if name.startswith("routing/load_") or name == "routing/mean_depth"]
    assert len(named) == 3  # over tokens, though micro-batches have different numbers of them
    for name in named:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


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


def test_frozen_parameters_stay_as_they_are_and_an_average_follows_the_others():
    """Weight decay included, and their gradients count in no norm."""
    graphdef, shapes_of = abstract_model(VANILLA.build)
    state = compiled_step(VANILLA, GRADIENT, ONE, ROWS, SEQ).state()
    frozen = chosen(nnx.state(nnx.merge(graphdef, shapes_of), nnx.Param), ("embedding", "body/stack/*/mixer"), "here")
    decaying = optax.chain(optax.add_decayed_weights(0.5), GRADIENT)
    step = jax.jit(make_train_step(graphdef, decaying, frozen=frozen, ema=0.9))
    begin = state._replace(opt=decaying.init(state.params), ema=state.params)
    after, metrics = step(begin, packed_batch(ROWS, SEQ, 32))
    before = jax.tree.leaves(state.params)
    for average, old, new in zip(jax.tree.leaves(after.ema), before, jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * new, atol=1e-6)  # (1 + 0) / (10 + 0) at the first step
    for still, a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(after.params), before, strict=True):
        assert still == np.array_equal(a, b)
    assert 0 < metrics["grad_norm"] < one_step(1)[1]["grad_norm"]


def test_auxiliary_routers_are_clipped_apart():
    """A huge gradient of one group leaves the other group's update as it is."""
    model = shapes.mor(2, 2, expert_choice.Settings(sampling="aux_router"), ends=0, **SHAPE)
    shapes_of = nnx.state(nnx.eval_shape(lambda: model.build(jax.random.key(0))), nnx.Param)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes_of)
    tx = make_optimizer(adamw.Settings(weight_decay=0.0, eps=1.0, clip_norm=1.0), ScheduleConfig(kind="constant"), 10)

    @jax.jit
    def updates(main: jax.Array, auxiliary: jax.Array):
        grad = lambda path, p: jnp.full_like(p, auxiliary if "aux_routers" in jax.tree_util.keystr(path) else main)  # noqa: E731
        return tx.update(jax.tree_util.tree_map_with_path(grad, params), tx.init(params), params)[0]

    calm, shaken, main_shaken = updates(1e-4, 1e-4), updates(1e-4, 1e4), updates(1e4, 1e-4)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(calm), jax.tree.leaves(shaken), jax.tree.leaves(main_shaken), strict=True
    ):
        same, moved = (c, b) if "aux_routers" in jax.tree_util.keystr(path) else (b, c)
        np.testing.assert_array_equal(a, same)
        assert np.any(a != moved)
