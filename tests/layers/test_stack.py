"""Stacks of blocks: the float32 stream, packed documents, padding, and going on where a call ended."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx

from adaptive.layers.layout import BlockShape, parse_layout
from adaptive.layers.stack import Places, Stack

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH = 2, 12, 16
SHAPE = BlockShape(
    width=WIDTH, intermediate=20, heads=2, rotary_dim=4, window=-1, expand=2, d_state=4, d_conv=4, ssm_head_dim=8,
    ssm_block=4,
)  # fmt: skip
LAYOUT = "T1m2M1t1"


@functools.cache
def split_stack(blocks=LAYOUT, shape=SHAPE, dtype=jnp.float32):
    # Weights larger than a real model's, so that every block says something at this size.
    main, key = parse_layout([blocks]).main, jax.random.key(0)
    make = lambda: Stack(main, shape, std=0.3, out_std=0.3, key=key, eps=1e-5, theta=1e4, dtype=dtype)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))[0], quick.jit(lambda: nnx.state(make()))()


@functools.cache
def compiled(keep=False, **options):
    graphdef, state = split_stack(**options)
    run = quick.jit(lambda state, x, places, before: nnx.merge(graphdef, state)(x, places, before, keep=keep))
    return lambda x, places, before=None: run(state, x, places, before)


def vectors(seed=0, batch=BATCH, seq=SEQ):
    return np.random.default_rng(seed).normal(size=(batch, seq, WIDTH)).astype(np.float32)


def plainly(batch=BATCH, seq=SEQ, first=0):
    return Places(jnp.asarray(np.broadcast_to(first + np.arange(seq), (batch, seq)), jnp.int32))


def test_equal_blocks_are_stored_together():
    runs = nnx.merge(*split_stack()).runs
    assert [run.norm.weight.shape for run in runs] == [(n, WIDTH) for n in (1, 2, 1, 1)]
    assert [run.feed_forward is not None for run in runs] == [True, False, True, False]
    assert runs[0].feed_forward.up.shape == (1, WIDTH, 128)  # 20, rounded up as the release does


def test_the_stream_is_float32_whatever_the_blocks_compute_in():
    graphdef, state = split_stack(dtype=jnp.bfloat16)
    x = jnp.asarray(vectors(), jnp.bfloat16)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x, plainly())[0])(state, x)
    scans = [e for e in program.eqns if e.primitive.name == "scan" and e.outvars[0].aval.shape == x.shape]
    assert [scan.outvars[0].aval.dtype for scan in scans] == [jnp.float32] * 4
    assert program.out_avals[0].dtype == jnp.bfloat16


def test_the_output_is_normalised():
    got, _ = compiled()(vectors(), plainly())
    np.testing.assert_allclose(np.square(got).mean(-1), 1, atol=1e-3)


@pytest.mark.parametrize("window", [-1, 3])
def test_going_on_where_a_call_ended(window):
    """In pieces of 5, 1, 1 and 5 positions: the same as at once."""
    shape = SHAPE._replace(window=window)
    x, run = vectors(), compiled(keep=True, shape=shape)
    want, _ = compiled(shape=shape)(x, plainly())
    state = nnx.merge(*split_stack(shape=shape)).empty_state(BATCH, SEQ + 2)
    out = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        places = plainly(seq=stop - start, first=start)._replace(seen=jnp.full(BATCH, start, jnp.int32))
        y, state = run(x[:, start:stop], places, state)
        out.append(y)
    np.testing.assert_allclose(np.concatenate(out, 1), want, atol=2e-5)


def test_rows_of_different_lengths_go_on():
    """Row 0 has 5 positions and then 7, row 1 has 2 and then none and then 4: each as if alone."""
    x, run = vectors(), compiled(keep=True)
    want, _ = compiled()(x, plainly())
    state = nnx.merge(*split_stack()).empty_state(BATCH, SEQ + 8)
    seen, out = np.zeros(BATCH, int), [[], []]
    for counts in [(5, 2), (7, 0), (0, 4)]:
        piece = np.full((BATCH, 7, WIDTH), 7.0, np.float32)
        for row, count in enumerate(counts):
            piece[row, :count] = x[row, seen[row] : seen[row] + count]
        number = seen[:, None] + np.arange(7)
        valid = np.arange(7) < np.array(counts)[:, None]
        places = Places(jnp.asarray(number, jnp.int32), None, jnp.asarray(valid), jnp.asarray(seen, jnp.int32))
        y, state = run(piece, places, state)
        for row, count in enumerate(counts):
            out[row].append(np.asarray(y)[row, :count])
        seen += counts
    np.testing.assert_allclose(np.concatenate(out[0]), want[0], atol=2e-5)
    np.testing.assert_allclose(np.concatenate(out[1]), want[1, :6], atol=2e-5)


def test_packed_documents_are_blind_to_each_other():
    x = vectors()
    segments = np.array([[1] * 5 + [2] * 7, [1] * 12])
    number = np.array([[*range(5), *range(7)], range(12)])
    places = Places(jnp.asarray(number, jnp.int32), jnp.asarray(segments, jnp.int32))
    packed, _ = compiled()(x, places)
    alone, _ = compiled()(np.concatenate([x[:, 5:], x[:, :5]], 1), plainly())
    np.testing.assert_allclose(packed[0, 5:], alone[0, :7], atol=2e-5)
    np.testing.assert_allclose(packed[1], compiled()(x, plainly())[0][1], atol=2e-5)


def test_a_position_sees_the_past_alone():
    x, other = vectors(), vectors()
    other[:, 7] += 1
    difference = np.abs(compiled()(x, plainly())[0] - compiled()(other, plainly())[0]).max((0, 2))
    assert difference[:7].max() == 0 and difference[7:].min() > 1e-3


def test_training_keeps_no_state():
    _, kept = compiled()(vectors(), plainly())
    assert kept is None
