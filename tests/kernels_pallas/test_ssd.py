"""The state space recurrence by blocks against the recurrence, and against one matrix over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from kernels_pallas import ssd as package
from kernels_pallas.ssd import chunked, gpu, reference, tpu
from kernels_pallas.ssd.blocks import runs_of

pytestmark = pytest.mark.compiles

ssd = jax.jit(package.ssd, static_argnames="block")
recurrence = jax.jit(reference.ssd)


def case(batch=2, seq=37, heads=3, dim=4, n=5, dtype=jnp.float32, seed=0, every=9):
    """Random x, dt, a, b, c, state and segments of about `every` positions, whose ids come back."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    x, b, c = normal((batch, seq, heads, dim)), normal((batch, seq, n)), normal((batch, seq, n))
    dt = np.log1p(np.exp(normal((batch, seq, heads)) - 1))
    a, state = -np.exp(normal(heads)), normal((batch, heads, dim, n))
    segments = 1 + np.cumsum(rng.random((batch, seq)) < 1 / every, axis=1) % 3
    wide = jnp.promote_types(dtype, jnp.float32)
    x, b, c = (jnp.asarray(v, dtype) for v in (x, b, c))
    dt, a, state = (jnp.asarray(v, wide) for v in (dt, a, state))
    return x, dt, a, b, c, state, jnp.asarray(segments, jnp.int32)


def one_matrix(x, dt, a, b, c, state, segments):
    """numpy float64: y = (L * C B^T) (dt x), L_ts = exp of the log decays between s and t, and what the state adds."""
    x, dt, a, b, c, state = (np.asarray(v, np.float64) for v in (x, dt, a, b, c, state))
    seq = x.shape[1]
    ids = np.zeros(x.shape[:2], int) if segments is None else np.asarray(segments)
    runs = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    total = np.cumsum(dt * a, axis=1)
    sees = np.tril(np.ones((seq, seq), bool)) & (runs[:, :, None] == runs[:, None])
    difference = np.where(sees[..., None], total[:, :, None] - total[:, None], -np.inf)
    matrix = np.exp(difference) * np.einsum("btn,bsn->bts", c, b)[..., None]
    carried = np.where((runs == 0)[..., None], np.exp(total), 0)
    y = np.einsum("btsh,bsh,bshp->bthp", matrix, dt, x) + np.einsum("bth,bhpn,btn->bthp", carried, state, c)
    final = np.einsum("bsh,bsh,bshp,bsn->bhpn", np.exp(difference[:, -1]), dt, x, b)
    return y, final + carried[:, -1][..., None, None] * state


def close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


SIZES = st.fixed_dictionaries({
    "batch": st.integers(1, 3), "seq": st.integers(1, 50), "heads": st.integers(1, 4), "dim": st.integers(1, 6),
    "n": st.integers(1, 7), "every": st.integers(1, 12), "seed": st.integers(0),
})  # fmt: skip
USUAL = {"batch": 2, "seq": 37, "heads": 3, "dim": 4, "n": 5, "every": 9, "seed": 0}


@settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(sizes=SIZES, block=st.integers(1, 60), segmented=st.booleans(), carried=st.booleans())
@example(sizes=USUAL, block=8, segmented=True, carried=True)
def test_recurrence_matrix_and_blocks_are_one(sizes, block, segmented, carried):
    with jax.enable_x64(True):
        *inputs, state, segments = case(**sizes, dtype=jnp.float64)
        segments, state = segments if segmented else None, state if carried else jnp.zeros_like(state)
        expected = one_matrix(*inputs, state, segments)
        close(recurrence(*inputs, segments=segments, state=state), expected, 1e-12)
        got = ssd(*inputs, segments=segments, state=state if carried else None, block=block)
        assert got[0].dtype == got[1].dtype == jnp.float64
        close(got, expected, 1e-12)


@pytest.mark.parametrize(("segmented", "block"), [(False, 8), (True, 8), (True, 256)])
def test_gradients(segmented, block):
    with jax.enable_x64(True):
        *inputs, segments = case(seq=19, dtype=jnp.float64)
        segments = segments if segmented else None

        def loss(f, *inputs):
            y, final = f(*inputs[:5], segments=segments, state=inputs[5])
            return (jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)).sum() + (final**3).sum()

        def grads(f):
            return jax.jit(jax.grad(functools.partial(loss, f), argnums=range(6)))(*inputs)

        close(grads(functools.partial(ssd, block=block)), grads(recurrence), 1e-12)


def test_gradients_are_the_slopes():
    with jax.enable_x64(True):
        *inputs, state, segments = case(seq=11, dtype=jnp.float64)
        run = jax.jit(lambda *inputs: ssd(*inputs[:5], segments=segments, state=inputs[5], block=8))
        check_grads(run, (*inputs, state), order=1, modes=["rev"], rtol=1e-6)


def test_one_position_is_one_step():
    x, dt, a, b, c, state, _ = case(seq=1)
    y, final = ssd(x, dt, a, b, c, state=state)
    expected = np.exp(dt[:, 0] * a)[..., None, None] * state + np.einsum("bh,bhp,bn->bhpn", dt[:, 0], x[:, 0], b[:, 0])
    close(final, expected, 1e-6)
    close(y[:, 0], np.einsum("bhpn,bn->bhp", expected, c[:, 0]), 1e-6)
    text = ssd.lower(x, dt, a, b, c, state=state).as_text()
    assert "while" not in text


def test_parts_are_the_whole():
    """The state carries over, within a segment and across the border of two."""
    *inputs, state, segments = case()
    whole = ssd(*inputs, segments=segments, state=state, block=8)
    x, dt, a, b, c = inputs
    outs, first, before = [], 0, None
    for n in (1, 11, 25):
        part = slice(first, first + n)
        if before is not None:  # a state is of the segment that goes on
            state = jnp.where((segments[:, first] == before)[:, None, None, None], state, 0)
        y, state = ssd(x[:, part], dt[:, part], a, b[:, part], c[:, part], segments=segments[:, part], state=state)
        outs, first, before = [*outs, y], first + n, segments[:, first + n - 1]
    close((jnp.concatenate(outs, axis=1), state), whole, 1e-5)


def test_where_dt_is_zero_nothing_happens():
    x, dt, a, b, c, state, _ = case(seq=30)
    held = ssd(x, jnp.zeros_like(dt), a, b, c, state=state, block=8)[1]
    np.testing.assert_array_equal(held, state)
    n = 13
    longer = ssd(x, dt.at[:, n:].set(0), a, b, c, state=state, block=8)
    close((longer[0][:, :n], longer[1]), ssd(x[:, :n], dt[:, :n], a, b[:, :n], c[:, :n], state=state, block=8), 1e-6)


def test_strong_decay_stays_finite():
    """exp of a decay over the whole block is 0, and of its inverse infinite."""
    x, dt, a, b, c, state, segments = case(seq=64)
    run = functools.partial(ssd, segments=segments, state=state, block=64)
    (y, final), pull = jax.vjp(run, x, 100 * dt, 10 * a, b, c)
    close((y, final), one_matrix(x, 100 * dt, 10 * a, b, c, state, segments), 1e-5)
    assert all(np.isfinite(d).all() for d in jax.jit(pull)((y, final)))


def test_nothing_passes_a_border():
    x, dt, a, b, c, state, _ = case(seq=32)
    segments = jnp.broadcast_to(jnp.arange(32) >= 13, (2, 32)).astype(jnp.int32)

    def later(x, state):
        y, final = ssd(x, dt, a, b, c, segments=segments, state=state, block=8)
        return (y[:, 13:] ** 2).sum() + final.sum()

    d_x, d_state = jax.jit(jax.grad(later, argnums=(0, 1)))(x, state)
    assert (d_x[:, :13] == 0).all() and (d_state == 0).all() and (d_x[:, 13:] != 0).any(axis=(2, 3)).all()


def test_bfloat16_sums_in_float32():
    *inputs, state, segments = case(seq=200, heads=4, dim=8, n=16, dtype=jnp.bfloat16, every=1000)
    y, final = ssd(*inputs, segments=segments, state=state)
    assert (y.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    close((y, final), one_matrix(*inputs, state, segments), 8e-3)
    d = jax.eval_shape(jax.grad(lambda *inputs: ssd(*inputs)[1].sum(), argnums=range(5)), *inputs)
    assert [v.dtype for v in d] == [v.dtype for v in inputs]


@pytest.mark.parametrize(
    ("seq", "most", "size"),
    [(24, 256, 24), (256, 256, 256), (257, 256, 136), (300, 128, 104), (3, 1, 1), (37, 5, 5), (1000, 64, 64)],
)
def test_blocks_are_as_few_and_as_small_as_they_can_be(seq, most, size):
    assert chunked.block_of(seq, most) == size
    assert -(-seq // size) == -(-seq // most)


# Sequences of two blocks on a TPU, and of three or four on a GPU. "wide" has two groups of heads.
SHAPES = {
    "narrow": {"seq": 140},
    "wide": {"batch": 1, "seq": 200, "heads": 4, "dim": 64, "n": 16, "every": 40},
}


@jax.jit
def recurrence_and_gradients(segments, x, dt, a, b, c, state, d_y, d_final):
    run = lambda x, dt, a, b, c, state: reference.ssd(x, dt, a, b, c, segments=segments, state=state)  # noqa: E731
    out, pull = jax.vjp(run, x, dt, a, b, c, state)
    return *out, *pull((d_y, d_final))


def kernels_and_recurrence(kernels, shape, dtype=jnp.float32, interpret=True):
    """(y, final state, cotangents of x, dt, a, b, c and state) by kernels, and by the recurrence in float32.

    Some positions are padding: their dt is 0.
    """
    x, dt, a, b, c, state, segments = case(**shape, dtype=dtype)
    seq = x.shape[1]
    dt = dt.at[:, seq // 3 : seq // 3 + 5].set(0).at[:, seq - 7 :].set(0)
    rng = np.random.default_rng(1)
    d_y, d_final = (jnp.asarray(rng.standard_normal(v.shape), v.dtype) for v in (x, state))
    inputs = x, dt, a, b, c, state, d_y, d_final

    def own(x, dt, a, b, c, state, d_y, d_final):
        given = x, dt, a, b, c, runs_of(x, segments), state
        return *kernels.forward(*given, interpret=interpret), *kernels.backward(
            *given, d_y, d_final, interpret=interpret
        )

    got, want = jax.jit(own)(*inputs), recurrence_and_gradients(segments, *(v.astype(jnp.float32) for v in inputs))
    assert [v.dtype for v in got] == [v.dtype for v in (x, state, x, dt, a, b, c, state)]
    return got, want


def test_gpu_kernels_equal_the_recurrence():
    close(*kernels_and_recurrence(gpu, SHAPES["narrow"]), 2e-5)


def test_gpu_kernels_equal_the_recurrence_in_bfloat16(monkeypatch):
    """With programs of several chunks, and of several heads."""
    monkeypatch.setattr(gpu, "PROGRAMS", 4)
    shape = SHAPES["wide"]
    assert gpu.plan(shape["seq"], 1, shape["heads"]) == gpu.Plan(size=64, kept=2, chunks=2, parts=1)
    close(*kernels_and_recurrence(gpu, shape, jnp.bfloat16), 1e-2)


def test_tpu_kernels_equal_the_recurrence(monkeypatch):
    """In the simulator, where memory that was not written is not a number and reads past an end raise."""
    monkeypatch.setattr(tpu, "HEADS", 2)  # fewer than TPUs like: a program is as long as its group of heads
    close(*kernels_and_recurrence(tpu, SHAPES["wide"], interpret=pltpu.InterpretParams()), 2e-5)


def test_tpu_kernels_equal_the_recurrence_in_bfloat16():
    close(*kernels_and_recurrence(tpu, SHAPES["narrow"], jnp.bfloat16), 1e-2)


@pytest.mark.parametrize(
    ("seq", "batch", "heads", "cut"),
    [
        (8192, 8, 32, gpu.Plan(64, 2, 64, 1)),
        (8192, 1, 32, gpu.Plan(64, 2, 8, 8)),
        (300, 4, 6, gpu.Plan(64, 2, 1, 3)),
        (24, 1, 1, gpu.Plan(32, 1, 1, 1)),
        (65, 64, 64, gpu.Plan(64, 2, 1, 1)),
    ],
)
def test_gpu_cuts_sequences_where_heads_and_rows_are_few(seq, batch, heads, cut):
    assert gpu.plan(seq, batch, heads) == cut
    assert cut.blocks * cut.size >= seq > (cut.blocks - cut.per_part) * cut.size


def test_gpu_takes_states_that_fit_a_processor():
    assert gpu.takes(64, 128) and gpu.takes(64, 256) and gpu.takes(100, 100)
    assert not gpu.takes(128, 256) and not gpu.takes(16, 512)


def test_within_shard_map():
    """Rows over one axis, heads over another: cotangents of what devices share are summed."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    x, dt, a, b, c, state, segments = case(batch=4, heads=4)
    split, carried = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    heads, rows = PartitionSpec("tensor"), PartitionSpec("data")

    def run(x, dt, a, b, c, segments, state):
        return ssd(x, dt, a, b, c, segments=segments, state=state, block=8)

    inputs = (split, split, heads, rows, rows, rows, carried)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=(split, carried))

    def loss(f, x, dt, a, b, c, state):
        y, final = f(x, dt, a, b, c, segments, state)
        return (y**2).sum() + (final**2).sum()

    pull = lambda f: jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=range(6)))  # noqa: E731
    close(pull(mapped)(x, dt, a, b, c, state), pull(run)(x, dt, a, b, c, state), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 8, 3)}, r"x is \(2, 8, 3\)"),
        ({"x": (2, 0, 3, 4)}, "at least one position"),
        ({"dt": (2, 8)}, r"dt must be \(2, 8, 3\)"),
        ({"a": (4,)}, r"a must be \(3,\)"),
        ({"b": (2, 7, 5)}, r"b must be \(2, 8, 5\)"),
        ({"b": (5,)}, r"b must be \(2, 8, 5\)"),
        ({"c": (2, 8, 6)}, r"c must be \(2, 8, 5\)"),
        ({"state": (2, 3, 5, 4)}, r"state must be \(2, 3, 4, 5\)"),
        ({"segments": (2, 9)}, r"segments must be \(2, 8\)"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_refuses_what_does_not_match(change, message):
    shapes = {"x": (2, 8, 3, 4), "dt": (2, 8, 3), "a": (3,), "b": (2, 8, 5), "c": (2, 8, 5)}
    arguments = {k: v if k == "block" else jnp.zeros(v) for k, v in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        ssd(**arguments)
