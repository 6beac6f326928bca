"""Stacks of blocks: patterns, the float32 stream, packed documents, padding, and going on where a call ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive.layers.call import Call
from adaptive.layers.site import Site
from adaptive.layers.stack import Making, Settings, Stack
from adaptive.layers.where import Where

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH = 2, 12, 16


def stacked(runs="T1m2M1t1", **shape):
    """The stack of these runs."""
    return shapes.hnet((runs,), widths=(WIDTH,), rotary_dim=4, ssm_head_dim=8, ssm_block=4, **shape).body.stack


STACK = stacked()


@functools.cache
def split_stack(settings=STACK, dtype=jnp.float32):
    # Weights larger than a real model's, so that every block says something at this size.
    keys = list(jax.random.split(jax.random.key(0), len(settings.blocks)))
    site = Site(WIDTH, 0.3, depth=settings.layers)
    make = lambda: Stack(settings, site, keys, Making(dtype), norm=True)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))[0], jax.jit(lambda: nnx.state(make()))()


@functools.cache
def compiled(settings=STACK, **call):
    """(x, where, state) -> (y, state)."""
    graphdef, state = split_stack(settings)
    run = jax.jit(lambda state, x, where, before: nnx.merge(graphdef, state)(x, where, Call(**call), before)[:2])
    return lambda x, where, before=None: run(state, x, where, before)


def vectors(seed=0, batch=BATCH, seq=SEQ):
    return np.random.default_rng(seed).normal(size=(batch, seq, WIDTH)).astype(np.float32)


def plainly(batch=BATCH, seq=SEQ):
    return Where.whole((batch, seq))


def after(seen, seq, exists=None):
    """Positions after so many earlier ones of each row."""
    return Where.after(jnp.broadcast_to(jnp.asarray(seen, jnp.int32), BATCH), seq, exists)


def test_equal_blocks_are_stored_together():
    blocks = nnx.merge(*split_stack()).blocks
    assert [block.mixer_norm.weight.shape for block in blocks] == [(n, WIDTH) for n in (1, 2, 1, 1)]
    assert [block.feed_forward is not None for block in blocks] == [True, False, True, False]
    assert blocks[0].feed_forward.up.shape == (1, WIDTH, 20)


def test_a_pattern_repeated_is_its_layers_in_a_row():
    """Two repeats of a block and two others: parameters in running order, and the layers one by one."""
    pattern = stacked("m1T2")
    twice = dataclasses.replace(pattern, repeats=2)
    assert [twice.numbers(i) for i in range(2)] == [(0, 3), (1, 2, 4, 5)] and twice.layers == 6
    _, state = split_stack(twice)
    got = compiled(twice)(vectors(), plainly())[0]
    flat = Settings((*pattern.blocks, *pattern.blocks), stream="float32")
    own = nnx.from_flat_state(
        [
            (path, value) if path[0] == "norm" else (("blocks", 2 * half + path[1], *path[2:]), value.replace(part))
            for path, value in nnx.to_flat_state(state)
            for half, part in enumerate([value[...]] if path[0] == "norm" else jnp.split(value[...], 2))
        ]
    )
    graphdef, _ = split_stack(flat)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, plainly(), Call())[0])
    np.testing.assert_allclose(got, run(own, vectors()), atol=1e-5)


def test_the_stream_is_float32_whatever_the_blocks_compute_in():
    graphdef, state = split_stack(dtype=jnp.bfloat16)
    x = jnp.asarray(vectors(), jnp.bfloat16)
    seen = []

    def run(state, x):
        module = nnx.merge(graphdef, state)
        y, _, _, _ = module.run(module.states(), x, plainly(), Call(), None)
        seen.append(y.dtype)
        return module(x, plainly(), Call())[0]

    program = jax.make_jaxpr(run)(state, x)
    assert seen == [jnp.float32] and program.out_avals[0].dtype == jnp.bfloat16
    scans = [e for e in program.eqns if e.primitive.name == "scan" and e.outvars[0].aval.shape == x.shape]
    assert {scan.outvars[0].aval.dtype for scan in scans} == {jnp.dtype(jnp.float32)}


def test_the_output_is_normalised():
    got, _ = compiled()(vectors(), plainly())
    np.testing.assert_allclose(np.square(got).mean(-1), 1, atol=1e-3)


@pytest.mark.parametrize("window", [0, 4])
def test_going_on_where_a_call_ended(window):
    """In pieces of 5, 1, 1 and 5 positions: the same as at once."""
    settings = stacked(window=window)
    x, run = vectors(), compiled(settings)
    want, _ = run(x, plainly())
    state = nnx.merge(*split_stack(settings)).empty(BATCH, SEQ + 2)
    out = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        y, state = run(x[:, start:stop], after(start, stop - start), state)
        out.append(y)
    np.testing.assert_allclose(np.concatenate(out, 1), want, atol=2e-5)


def test_rows_of_different_lengths_go_on():
    """Row 0 has 5 positions and then 7, row 1 has 2 and then none and then 4: each as if alone."""
    x, run = vectors(), compiled()
    want, _ = compiled()(x, plainly())
    state = nnx.merge(*split_stack()).empty(BATCH, SEQ + 8)
    seen, out = np.zeros(BATCH, int), [[], []]
    for counts in [(5, 2), (7, 0), (0, 4)]:
        piece = np.full((BATCH, 7, WIDTH), 7.0, np.float32)
        for row, count in enumerate(counts):
            piece[row, :count] = x[row, seen[row] : seen[row] + count]
        valid = np.arange(7) < np.array(counts)[:, None]
        y, state = run(piece, after(seen, 7, jnp.asarray(valid)), state)
        for row, count in enumerate(counts):
            out[row].append(np.asarray(y)[row, :count])
        seen += counts
    np.testing.assert_allclose(np.concatenate(out[0]), want[0], atol=2e-5)
    np.testing.assert_allclose(np.concatenate(out[1]), want[1, :6], atol=2e-5)


def test_packed_documents_are_blind_to_each_other():
    x = vectors()
    segments = np.array([[1] * 5 + [2] * 7, [1] * 12])
    number = np.array([[*range(5), *range(7)], range(12)])
    where = Where.whole((BATCH, SEQ), None, jnp.asarray(segments, jnp.int32))
    np.testing.assert_array_equal(where.number, number)
    packed, _ = compiled()(x, where)
    alone, _ = compiled()(np.concatenate([x[:, 5:], x[:, :5]], 1), plainly())
    np.testing.assert_allclose(packed[0, 5:], alone[0, :7], atol=2e-5)
    np.testing.assert_allclose(packed[1], compiled()(x, plainly())[0][1], atol=2e-5)


def test_a_position_sees_the_past_alone():
    x, other = vectors(), vectors()
    other[:, 7] += 1
    difference = np.abs(compiled()(x, plainly())[0] - compiled()(other, plainly())[0]).max((0, 2))
    assert difference[:7].max() == 0 and difference[7:].min() > 1e-3


def test_a_state_is_kept_where_one_was_given_or_asked_for():
    assert compiled()(vectors(), plainly())[1] is None
    graphdef, state = split_stack()
    kept = jax.eval_shape(lambda: nnx.merge(graphdef, state)(vectors(), plainly(), Call(keep=True))[1])
    assert [jax.tree.leaves(own)[0].shape[:2] for own in kept] == [(n, BATCH) for n in (1, 2, 1, 1)]
