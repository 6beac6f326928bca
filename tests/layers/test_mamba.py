"""The Mamba-2 layer against the same written out in numpy, one position after another, and against itself in parts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.mixers.mamba2 import Settings
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, constrain_state, placement

pytestmark = pytest.mark.compiles

WIDTH, EPS = 12, 1e-3
OPTIONS = Settings(expand=2, d_state=5, d_conv=4, head_dim=6, block=8)
BATCH, SEQ = 2, 21
SEGMENTS = jnp.asarray([[3] * 2 + [1] * 9 + [3] * 1 + [2] * 9, [7] * 13 + [8] * 8], jnp.int32)


def layer(options=OPTIONS, seed=0, width=WIDTH):
    """A layer whose scales are all random, of a size that tells them apart."""
    module = options.build(Site(width, 0.5, norm_eps=EPS), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for name in ("d", "norm", "dt_bias"):
        param = getattr(module, name)
        param[...] = param[...] + jnp.asarray(rng.normal(0, 0.5, param.shape), jnp.float32)
    return module


def inputs(seed=0, batch=BATCH, seq=SEQ, width=WIDTH):
    return jax.random.normal(jax.random.key(seed), (batch, seq, width))


def written_out(module, x, segments):
    """float64 [n, width] -> (update [n, width], conv state, ssm state) of one row."""
    p = {path[0]: np.asarray(param[...], np.float64) for path, param in nnx.to_flat_state(nnx.state(module))}
    heads, dim = p["norm"].shape
    n, taps = p["bc"].shape[1] // 2, p["conv_bc"].shape[0]
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    flat = lambda v: v.reshape(*v.shape[:-2], heads * dim)  # noqa: E731
    weights = np.concatenate([flat(p["conv_x"]), p["conv_bc"]], axis=-1)
    bias = np.concatenate([flat(p["conv_x_bias"]), p["conv_bc_bias"]])
    conv, state, first, out = np.zeros((taps, weights.shape[1])), np.zeros((heads, dim, n)), 0, []
    for t, u in enumerate(np.asarray(x, np.float64)):
        if t and segments[t] != segments[t - 1]:
            state, first = np.zeros_like(state), t
        mixed = np.concatenate([(u @ p["x"].reshape(len(u), -1)), u @ p["bc"]])
        conv = np.concatenate([conv[1:], mixed[None]])
        seen = np.arange(t - taps + 1, t + 1) >= first
        active = silu((conv * weights * seen[:, None]).sum(0) + bias)
        inner, b, c = np.split(active, [heads * dim, heads * dim + n])
        inner = inner.reshape(heads, dim)
        dt = np.log1p(np.exp(u @ p["dt"] + p["dt_bias"]))
        decay = np.exp(-dt * np.exp(p["a_log"]))
        state = decay[:, None, None] * state + dt[:, None, None] * inner[:, :, None] * b
        y = state @ c + p["d"][:, None] * inner
        gated = y * silu((u @ p["z"].reshape(len(u), -1)).reshape(heads, dim))
        normed = gated / np.sqrt(np.mean(gated**2) + EPS) * p["norm"]
        out.append(normed.reshape(-1) @ p["out"].reshape(heads * dim, -1))
    return np.stack(out), conv, state


@jax.jit(static_argnames="keep")
def run(module, x, segments=None, valid=None, state=None, keep=True):
    """(update, state) at the first positions of rows."""
    where = Where.whole(x.shape[:2], None, segments, valid)
    return module(x, where, Call(keep=keep), state)[:2]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("options", [OPTIONS, dataclasses.replace(OPTIONS, d_conv=1, expand=1, head_dim=3, block=256)])
def test_equals_the_formulas(options, segments):
    module, x = layer(options), inputs()
    update, state = run(module, x, segments)
    ids = np.zeros((BATCH, SEQ), int) if segments is None else np.asarray(segments)
    for row in range(BATCH):
        expected, conv, ssm = written_out(module, x[row], ids[row])
        np.testing.assert_allclose(update[row], expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state.conv[row], conv, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.ssm[row], ssm, rtol=2e-4, atol=1e-5)


def close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, expected)


@pytest.mark.parametrize("parts", [[1] * SEQ, [9] + [1] * (SEQ - 9), [2, 1, 3, 8, 7], [13, 8]], ids=str)
def test_goes_on_where_it_left_off(parts):
    module, x = layer(), inputs()
    whole = run(module, x)
    state, updates, first = module.empty(BATCH, 0, x.dtype), [], 0
    for n in parts:
        update, state = run(module, x[:, first : first + n], state=state)
        updates.append(update)
        first += n
    close((jnp.concatenate(updates, axis=1), state), whole)


def test_a_segment_is_a_sequence_of_its_own():
    module, x = layer(), inputs()
    update, state = run(module, x, SEGMENTS)
    for row, bounds in enumerate([[0, 2, 11, 12, SEQ], [0, 13, SEQ]]):
        for first, end in itertools.pairwise(bounds):
            own, last = run(module, x[row : row + 1, first:end])
            close(update[row : row + 1, first:end], own)
        close(state.ssm[row], last.ssm[0])


def test_a_carried_state_is_of_the_first_segment():
    module, x = layer(), inputs()
    _, before = run(module, inputs(1))
    update, _ = run(module, x, SEGMENTS, state=before)
    close(update[0, :2], run(module, x[:, :2], state=before)[0][0])
    close(update[0, 2:11], run(module, x[:, 2:11])[0][0])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("lengths", [(5, 2), (1, SEQ), (3, 14)], ids=str)
def test_rows_of_different_lengths(lengths, segments):
    module, x = layer(), inputs()
    _, before = run(module, inputs(1))
    valid = jnp.arange(SEQ) < jnp.asarray(lengths)[:, None]
    update, state = run(module, x, segments, valid, before)
    assert np.isfinite(update).all()
    for row, n in enumerate(lengths):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (x[:, :n], segments, before))
        own = run(module, alone[0], None if segments is None else alone[1][:, :n], None, alone[2])
        close((update[row : row + 1, :n], state.conv[row : row + 1], state.ssm[row : row + 1]), (own[0], *own[1]))


@pytest.mark.parametrize("n", [1, 6])
def test_a_row_without_valid_positions_keeps_its_state_exactly(n):
    module, x = layer(), inputs(seq=n)
    _, before = run(module, inputs(1))
    valid = jnp.asarray([[False] * n, [True] * n])
    ids = jnp.asarray([[1, 2, 3, 4, 5, 6]] * BATCH)[:, :n]
    for segments in (None, ids):
        _, after = run(module, x, segments, valid, before)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, before)
        assert all(np.abs(a[1] - b[1]).max() > 1e-3 for a, b in zip(after, before, strict=True))


def test_without_keep_there_is_no_state():
    module, x = layer(), inputs()
    update, state = run(module, x, keep=False)
    assert state is None
    close(update, run(module, x)[0])


def test_bfloat16_keeps_a_float32_state():
    module, x = layer(), inputs().astype(jnp.bfloat16)
    update, state = run(module, x)
    assert (update.dtype, state.conv.dtype, state.ssm.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact, exact_state = run(module, x.astype(jnp.float32))
    assert np.abs(update.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()
    assert np.abs(state.ssm - exact_state.ssm).max() < 0.03 * np.abs(exact_state.ssm).max()


def test_a_slow_decay_survives_bfloat16():
    """Nothing is written, and a decay so close to 1 that bfloat16 cannot tell it from 1."""
    module, x = layer(), jnp.zeros((BATCH, SEQ, WIDTH), jnp.bfloat16)
    module.a_log[...] = jnp.full_like(module.a_log[...], np.log(1e-3))
    module.dt_bias[...] = jnp.full_like(module.dt_bias[...], np.log(np.expm1(1.0)))
    module.conv_x_bias[...] = jnp.zeros_like(module.conv_x_bias[...])
    empty = module.empty(BATCH, 0, x.dtype)
    after = run(module, x, state=empty._replace(ssm=jnp.full_like(empty.ssm, 1000.0)))[1]
    np.testing.assert_allclose(after.ssm, 1000 * np.exp(-1e-3 * SEQ), rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(tensor=4), MeshConfig(context=4, tensor=2)], ids=["whole", "split"])
def test_sharded_equals_unsharded(mesh):
    """Rows over data, heads over tensor, the sequence with documents that cross its parts over context; gradients too,
    of parameters that are split and of those that are not, and of the state before."""
    module = layer(dataclasses.replace(OPTIONS, head_dim=3), width=12)
    x, target = inputs(batch=4, seq=24), inputs(2, batch=4, seq=24)
    ends = jnp.concatenate([SEGMENTS, SEGMENTS])
    segments = jnp.concatenate([ends, jnp.broadcast_to(ends[:, -1:], (4, 3))], axis=1)
    before = jax.tree.map(lambda a: jax.random.normal(jax.random.key(3), a.shape), module.empty(4, 0, x.dtype))

    def loss(both, x, target):
        module, before = both
        update, state, _ = module(x, Where.whole(x.shape[:2], None, segments), Call(keep=True), before)
        return (update * target).mean() + 0.1 * (state.ssm**2).mean() + 0.1 * (state.conv**2).mean()

    plain = jax.jit(nnx.value_and_grad(loss))((module, before), x, target)
    with placement(make_mesh(mesh), AxisRules()):

        @jax.jit
        def placed(both, x, target):
            nnx.update(both[0], constrain_state(nnx.state(both[0])))
            value, grads = nnx.value_and_grad(loss)(both, x, target)
            return value, (constrain_state(grads[0]), grads[1])

        split = placed((module, before), x, target)
    assert "tensor" in str(split[1][0]["out"][...].sharding.spec)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), split, plain)


def test_starts_as_the_published_layer():
    site = Site(64, 0.02, stack=(3,), out_std=0.005)
    module = Settings(d_state=16, head_dim=8).build(site, jax.random.key(0))
    shapes = {path[0]: param.shape for path, param in nnx.to_flat_state(nnx.state(module))}
    heads, dim, n = 16, 8, 16
    assert shapes == {
        "z": (3, 64, heads, dim), "x": (3, 64, heads, dim), "bc": (3, 64, 2 * n), "dt": (3, 64, heads),
        "conv_x": (3, 4, heads, dim), "conv_x_bias": (3, heads, dim), "conv_bc": (3, 4, 2 * n),
        "conv_bc_bias": (3, 2 * n), "dt_bias": (3, heads), "a_log": (3, heads), "d": (3, heads),
        "norm": (3, heads, dim), "out": (3, heads, dim, 64),
    }  # fmt: skip
    for name in ("z", "x", "bc", "dt"):
        assert np.std(getattr(module, name)[...]) == pytest.approx(0.02, rel=0.05)
    assert np.std(module.out[...]) == pytest.approx(0.005, rel=0.05)
    for name in ("conv_x", "conv_x_bias", "conv_bc", "conv_bc_bias"):
        value = np.abs(getattr(module, name)[...])
        assert value.max() <= 0.5 and value.mean() == pytest.approx(0.25, rel=0.15)
    step = np.asarray(jax.nn.softplus(module.dt_bias[...]))
    assert 1e-3 * 0.999 <= step.min() < 3e-3 and 3e-2 < step.max() <= 0.1 * 1.001
    rate = np.exp(module.a_log[...])
    assert 1 <= rate.min() < 4 and 13 < rate.max() <= 16.001
    assert (module.d[...] == 1).all() and (module.norm[...] == 1).all()
    for _, param in nnx.to_flat_state(nnx.state(module)):
        assert len(param.get_metadata()["axes"]) == param.ndim


def test_holes_among_the_positions_are_as_if_they_had_never_been():
    module, x = layer(), inputs()
    exists = np.random.default_rng(6).random((1, SEQ)) < 0.6
    where = Where.whole((1, SEQ)).only(jnp.asarray(exists))
    update, state, _ = jax.jit(lambda m, x, w: m(x, w, Call(keep=True), None))(module, x[:1], where)
    own, last = run(module, x[:1][exists][None])
    close((update[exists], *state), (own[0], *last))


def test_heads_must_divide_the_inner_channels():
    with pytest.raises(RecipeError, match=r"a.b.expand \* width = 24 is not a multiple of .*64; nearest.* 32"):
        Settings().check(12, "a.b")
