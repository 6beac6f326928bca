"""Strategies of depth alone, around a core of one line: who takes which pass, and what becomes of the stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.layers.call import Call
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.models.depth import Carried, expert_choice, token_choice
from adaptive.models.depth import all as everyone
from adaptive.routing.expert_choice import capacity_limit

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH = 2, 24, 16
EXPERT, TOKEN = expert_choice.Settings(), token_choice.Settings()
X = np.random.default_rng(3).normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)
MAPS = np.random.default_rng(4).normal(size=(3, WIDTH, WIDTH)).astype(np.float32) / 4


def core(r, x, where, call, carried):
    """Each position reads those before it in its own pass."""
    there = jnp.ones(x.shape[:2]) if where.exists is None else where.exists.astype(jnp.float32)
    mean = jnp.cumsum(x * there[..., None], 1) / jnp.maximum(jnp.cumsum(there, 1), 1)[..., None]
    return x + jnp.tanh((x + mean) @ jnp.asarray(MAPS)[r % 3]), carried, {}


def at_pass(r, x):
    """The core's output on all positions."""
    return core(r, x, Where.whole(x.shape[:2]), Call(), Carried(None))[0]


@functools.cache
def module(settings, passes):
    return settings.build(passes, Site(WIDTH, 0.3), iter(jax.random.split(jax.random.key(1), 64)))


def routed(settings, passes=3, *, x=X, segments=None, exists=None, step=None, **about):
    """What the strategy makes of x."""
    call, made = Call(training=step is not None, **about), module(settings, passes)

    @jax.jit
    def run(x, segments, exists, step):
        where = Where.whole(x.shape[:2], None, segments, exists)
        return made(core, x, where, call.replace(step=step), Carried(None))

    return run(x, segments, exists, step)


def held(routed) -> list[list[int]]:
    return [np.asarray(s.valid).sum(1).tolist() for s in routed.trace.selections]


def test_capacities_round_as_published():
    def capacities(passes, positions):
        return expert_choice.capacities(EXPERT.fractions(passes), positions)

    assert capacities(3, 2048) == (2048, 1365, 682)
    assert capacities(2, 2048) == (2048, 1024)
    assert capacities(4, 2048) == (2048, 1536, 1024, 512)
    assert capacities(3, 2) == (2, 1, 1)


@pytest.mark.parametrize("sampling", ["aux_loss", "aux_router", "none"])
def test_selections_are_nested_ascending_and_full(sampling):
    out = routed(expert_choice.Settings(sampling=sampling))
    before, depth = np.ones((BATCH, SEQ), bool), np.zeros((BATCH, SEQ), int)
    for selection, capacity in zip(out.trace.selections, (24, 16, 8), strict=True):
        assert selection.indices.shape == (BATCH, capacity) and np.all(selection.valid)
        assert np.all(np.diff(selection.indices, axis=1) > 0)
        now = np.zeros((BATCH, SEQ), bool)
        np.put_along_axis(now, np.asarray(selection.indices), True, axis=1)
        assert not np.any(now & ~before)
        before, depth = now, depth + now
    np.testing.assert_array_equal(out.trace.depth, depth)
    scores = np.stack(out.trace.scores)
    assert np.array_equal(np.isfinite(scores).sum((1, 2)), [48, 48, 32])  # candidates: those of the step before


def test_padding_is_never_selected_while_tokens_are_left():
    segments = jnp.ones((BATCH, SEQ), jnp.int32).at[0, 20:].set(0).at[1, 5:].set(0)
    out = routed(EXPERT, segments=segments)
    assert held(out) == [[20, 5], [16, 5], [8, 5]]
    assert not np.any(np.asarray(out.trace.depth)[np.asarray(segments) == 0])
    for selection in out.trace.selections:
        assert np.all(np.diff(selection.indices, axis=1) > 0)


def test_rows_that_hold_less_have_capacities_of_their_own():
    exists = np.arange(SEQ) < np.array([[24], [9]])
    assert held(routed(EXPERT, exists=exists)) == [[24, 9], [16, 6], [8, 3]]


def test_a_token_that_stopped_stays_out_in_generation():
    """Positions that a later router would take again are there, and do not come back."""
    out = routed(EXPERT, rule="causal")
    held_at = np.stack([np.asarray(selection.valid) for selection in out.trace.selections])
    assert held_at[0].all() and (held_at[1:] <= held_at[:-1]).all()
    weights = [np.asarray(router.out[...])[:, 0] for router in module(EXPERT, 3).routers]
    stopped = held_at[0] & ~held_at[1]  # their stream is what the first pass left, which is what comes out
    assert (np.asarray(out.x)[stopped] @ weights[2] > 0).any()
    assert np.asarray(out.trace.depth)[stopped].max() == 1


def test_full_capacity_and_additive_gating_is_x_plus_f():
    got = routed(expert_choice.Settings(capacities=(1.0, 1.0), gating="additive"), 2)
    want = X + at_pass(0, X)
    want = want + at_pass(1, want)
    np.testing.assert_allclose(got.x, want, atol=1e-5, rtol=1e-5)
    assert np.all(np.asarray(got.trace.depth) == 2)


def test_the_gate_scales_the_update():
    settings = expert_choice.Settings(capacities=(1.0, 1.0))
    want = X
    for r in range(2):
        gate = 0.1 / (1 + np.exp(-np.asarray(module(settings, 2).routers[r](want))))
        want = want + gate * at_pass(r, want)
    np.testing.assert_allclose(routed(settings, 2).x, want, atol=1e-5, rtol=1e-5)


def test_tokens_that_are_not_selected_stay_as_they_are():
    both = routed(expert_choice.Settings(capacities=(0.5, 0.25)), 2)
    depth = np.asarray(both.trace.depth)
    assert np.bincount(depth.ravel()).tolist() == [24, 12, 12]
    np.testing.assert_array_equal(np.asarray(both.x)[depth == 0], X[depth == 0])
    one = np.asarray(routed(expert_choice.Settings(capacities=(0.5,)), 1).x)  # another program, so not to the bit
    difference = np.abs(np.asarray(both.x) - one).max(-1)
    assert difference[depth == 1].max() < 1e-6 and difference[depth == 2].min() > 1e-3


def test_token_choice_at_full_depth_is_x_plus_gated_last_pass():
    settings = token_choice.Settings(balance_warmup_steps=1)
    got, h = routed(settings, step=jnp.zeros((), jnp.int32)), X
    for r in range(3):
        h = at_pass(r, h)
    gate = jax.nn.softmax(module(settings, 3).router(X), axis=-1)[..., 2:]
    assert np.all(np.asarray(got.trace.depth) == 3)
    np.testing.assert_allclose(got.x, X + gate * h, atol=1e-5, rtol=1e-5)


def test_token_choice_with_room_for_all_equals_masked():
    roomy = token_choice.Settings(execution="capacity", capacities=(1.0, 1.0, 1.0))
    got, want = routed(roomy), routed(TOKEN)
    np.testing.assert_array_equal(got.trace.depth, want.trace.depth)
    np.testing.assert_allclose(got.x, want.x, atol=1e-5, rtol=1e-5)
    assert got.trace.scalars["overflow"] == 0
    assert len(np.unique(got.trace.depth)) == 3, "the example should use every depth"


def test_token_choice_counts_what_overflows():
    tight = routed(token_choice.Settings(execution="capacity", capacities=(1.0, 1 / 24, 1 / 24)))
    depth, wanted = np.asarray(tight.trace.depth), np.asarray(routed(TOKEN).trace.depth)
    assert np.all((depth > 1).sum(1) <= 1) and np.all(depth <= wanted)
    for row in range(BATCH):  # first come, first served
        assert np.flatnonzero(depth[row] > 1).tolist() == np.flatnonzero(wanted[row] > 1)[:1].tolist()
    assert tight.trace.scalars["overflow"] >= ((depth < wanted).sum() - 0.5) / depth.size


def test_capacity_warm_up_takes_the_published_numbers():
    want = [(47, 47), (46, 44), (44, 41), (42, 36), (40, 32), (37, 27), (35, 22), (33, 19), (32, 16), (32, 16)]
    got = [tuple(int(capacity_limit(c, 48, jnp.asarray(t), 10)) for c in (2 / 3, 1 / 3)) for t in range(10)]
    assert got == want
    for t in (0, 1, 6):
        out = routed(expert_choice.Settings(capacity_warmup_steps=4), step=jnp.asarray(t))
        limits = [int(capacity_limit(c, SEQ, jnp.asarray(t), 4)) for c in (1, 2 / 3, 1 / 3)]
        assert held(out) == [[k, k] for k in limits]
        assert np.all(np.asarray(out.trace.depth).sum(1) == sum(limits))
    np.testing.assert_array_equal(out.trace.depth, routed(EXPERT).trace.depth)


@pytest.mark.parametrize("gating", ["weighted", "additive"])
def test_routers_learn_through_the_gate(gating):
    """Without any auxiliary loss the language-model loss still reaches every router; additive gating cuts that."""
    settings = expert_choice.Settings(sampling="none", gating=gating)
    graphdef, state = nnx.split(module(settings, 2))

    @jax.jit
    def grads(state):
        run = lambda s: nnx.merge(graphdef, s)(core, X, Where.whole(X.shape[:2]), Call(), Carried(None)).x  # noqa: E731
        return jax.grad(lambda s: (run(s) ** 2).mean())(state)

    assert [bool(np.any(g)) for g in jax.tree.leaves(grads(state)["routers"])] == [gating == "weighted"] * 2


@pytest.mark.parametrize(("settings", "rule"), [(EXPERT, "causal"), (TOKEN, "train"), (everyone.Settings(), "train")])
def test_a_position_that_does_not_exist_changes_nothing(settings, rule):
    """Holes among the positions: as if they had never been there."""
    exists = np.random.default_rng(5).random((1, SEQ)) < 0.6
    x = np.where(exists[..., None], X[:1], 7.0).astype(np.float32)
    out = routed(settings, x=x, exists=exists, rule=rule)
    alone = routed(settings, x=X[:1][exists][None], rule=rule)
    np.testing.assert_allclose(np.asarray(out.x)[exists], alone.x[0], atol=1e-5)
    if settings != everyone.Settings():
        np.testing.assert_array_equal(np.asarray(out.trace.depth)[exists], alone.trace.depth[0])


# All positions, as a loop


def test_a_loop_of_passes_is_the_passes_written_out():
    np.testing.assert_allclose(routed(everyone.Settings(loop=True)).x, routed(everyone.Settings()).x, atol=1e-6)
    where, made = Where.whole(X.shape[:2]), module(everyone.Settings(), 3)
    run = jax.jit(lambda n: made(core, X, where, Call(passes=n), Carried(None)))
    want = X
    for passes in range(5):
        got = run(jnp.asarray(passes))
        np.testing.assert_allclose(got.x, want, rtol=1e-5, atol=1e-5)
        assert np.all(np.asarray(got.trace.depth) == passes)
        want = at_pass(passes, want)
