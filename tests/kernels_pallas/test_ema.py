"""The moving average: every form against a loop in float64, its gradients, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from adaptive.benchmarks import ema as benchmark
from kernels_pallas.ema import ema, forms, gpu, linear, reference, tpu

pytestmark = pytest.mark.compiles

FORMS = {
    "pairs": forms.by_pairs,
    "blocks": functools.partial(forms.by_blocks, block=8),
    "tpu": functools.partial(tpu.recurrence, interpret=True),
    "gpu": functools.partial(gpu.recurrence, interpret=True),
}


def loop(z, p, starts, initial):
    """The formula, position by position in float64."""
    z, p, past = (np.asarray(a, np.float64) for a in (z, p, initial))
    out = np.empty_like(z)
    for k in range(z.shape[1]):
        past = np.where(starts[:, k, None], 0, (1 - p[:, k, None]) * past) + p[:, k, None] * z[:, k]
        out[:, k] = past
    return out


def draw(batch, n, width, seed=0):
    """z, p with some exact 0s and 1s, starts, initial."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0, 1, (batch, n)).astype(np.float32) ** 3
    p[rng.uniform(size=p.shape) < 0.1] = 1
    p[rng.uniform(size=p.shape) < 0.1] = 0
    p[rng.uniform(size=p.shape) < 0.2] = 1e-4
    z, initial = (rng.normal(size=shape).astype(np.float32) for shape in ((batch, n, width), (batch, width)))
    return z, p, rng.uniform(size=p.shape) < 0.1, initial


@pytest.mark.parametrize("n", [1, 9, 60])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_loop(form, reverse, n):
    z, p, starts, initial = draw(3, n, 5)
    keep = np.where(starts, 0, 1 - p)
    flip = (lambda a: a[:, ::-1]) if reverse else lambda a: a
    out = jax.jit(functools.partial(FORMS[form], reverse=reverse))(flip(z), flip(p), flip(keep), initial)
    np.testing.assert_allclose(flip(np.asarray(out)), loop(z, p, starts, initial), atol=2e-6)


@pytest.mark.parametrize("f", [ema, reference.ema], ids=["ema", "reference"])
def test_the_public_function_is_the_loop(f):
    z, p, starts, initial = draw(2, 19, 4)
    none, zero = np.zeros_like(starts), np.zeros_like(initial)
    for given, expected in (
        ({}, loop(z, p, none, zero)),
        ({"starts": starts}, loop(z, p, starts, zero)),
        ({"initial": initial}, loop(z, p, none, initial)),
        ({"starts": starts, "initial": initial}, loop(z, p, starts, initial)),
    ):
        np.testing.assert_allclose(f(z, p, **given), expected, atol=2e-6)


@pytest.mark.parametrize("n", [1, 11])
def test_gradients_are_those_of_finite_differences(n):
    z, p, starts, initial = draw(2, n, 3)
    p = np.clip(p, 0.05, 0.95)  # so that differences stay inside [0, 1]
    f = lambda z, p, initial: ema(z, p, starts=starts, initial=initial)  # noqa: E731
    check_grads(f, (z, p, initial), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_gradients_are_those_of_the_specification():
    z, p, starts, initial = draw(3, 33, 6)
    d = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)

    def pulled(f):
        return jax.vjp(lambda z, p, i: f(z, p, starts=starts, initial=i), z, p, initial)[1](d)

    for mine, theirs in zip(pulled(ema), pulled(reference.ema), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_a_rate_of_1_gives_the_values_and_of_0_the_past():
    z, _, _, initial = draw(2, 9, 4)
    np.testing.assert_array_equal(ema(z, np.ones((2, 9), np.float32), initial=initial), z)
    still = ema(z, np.zeros((2, 9), np.float32), initial=initial)
    np.testing.assert_array_equal(still, np.broadcast_to(initial[:, None], z.shape))


def test_a_start_keeps_its_rate_and_forgets_the_past():
    z, p, _, initial = draw(2, 12, 4)
    starts = np.zeros((2, 12), bool)
    starts[:, 7] = True
    out = ema(z, p, starts=starts, initial=initial)
    np.testing.assert_allclose(out[:, 7], p[:, 7, None] * z[:, 7], atol=1e-6)
    np.testing.assert_allclose(out[:, 7:], ema(z[:, 7:], p[:, 7:]), atol=1e-6)
    np.testing.assert_allclose(out[:, :7], ema(z[:, :7], p[:, :7], initial=initial), atol=1e-6)


def test_it_continues_from_where_it_stopped():
    z, p, starts, initial = draw(2, 20, 4)
    whole = ema(z, p, starts=starts, initial=initial)
    past = initial
    for part in (slice(0, 1), slice(1, 9), slice(9, 20)):
        out = ema(z[:, part], p[:, part], starts=starts[:, part], initial=past)
        np.testing.assert_allclose(out, whole[:, part], atol=1e-6)
        past = out[:, -1]


def test_half_precision_comes_back_in_float32_with_gradients_in_its_own():
    z, p, _, _ = draw(2, 40, 8)
    half = jnp.asarray(z, jnp.bfloat16)
    out, pull = jax.vjp(ema, half, jnp.asarray(p))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, ema(half.astype(jnp.float32), p), atol=1e-6)
    assert [d.dtype for d in pull(out)] == [jnp.bfloat16, jnp.float32]


def test_shapes_that_do_not_match_are_refused():
    z, p, starts, initial = draw(2, 5, 4)
    for args, given, says in (
        ((z[0], p), {}, "z "),
        ((z, p[:, 1:]), {}, "p "),
        ((z, p), {"starts": starts[:1]}, "starts "),
        ((z, p), {"initial": initial[:, 1:]}, "initial "),
    ):
        with pytest.raises(ValueError, match=says):
            ema(*args, **given)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks along both axes, the last ones cut short."""
    monkeypatch.setattr(tpu, "ROWS", 8)
    monkeypatch.setattr(tpu, "COLUMNS", 128)
    monkeypatch.setattr(gpu, "ROWS", 4)
    monkeypatch.setattr(gpu, "COLUMNS", 16)


KERNELS = {
    "tpu": functools.partial(tpu.recurrence, interpret=True),
    # This one fills what lies outside of arrays with NaN and watches for reads of what is not yet written.
    "tpu, strict": functools.partial(tpu.recurrence, interpret=pltpu.InterpretParams(uninitialized_memory="nan")),
    "gpu": functools.partial(gpu.recurrence, interpret=True),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_forwards_and_backwards_over_cut_blocks(kernel, dtype, small_blocks):
    z, p, starts, initial = draw(2, 21, 150)
    z = jnp.asarray(z, dtype)
    keep = jnp.where(starts, 0, 1 - p)
    out, pull = jax.vjp(lambda z, p, initial: reference.ema(z, p, starts=starts, initial=initial), z, p, initial)
    np.testing.assert_allclose(KERNELS[kernel](z, p, keep, initial), out, atol=2e-6)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
    pulled = linear.backward(KERNELS[kernel], z, p, starts, initial, out, d_out)
    for mine, theirs, close in zip(
        pulled, pull(d_out), (2e-6 if dtype == "float32" else 2e-2, 1e-4, 2e-6), strict=True
    ):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs.astype(jnp.float32), atol=close)


def test_rows_split_over_devices_give_the_same():
    z, p, starts, initial = draw(8, 10, 4)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def pulled(f, rates):
        of = lambda z, p, initial: f(z, p, initial, starts)  # noqa: E731
        return jax.jit(lambda *a: jax.vjp(of, *a)[1](jnp.ones(z.shape, jnp.float32)))(z, rates, initial)

    def shared(z, p, initial, starts):
        """The rates are the same on every device: their cotangents are summed."""
        return ema(z, jnp.broadcast_to(p, z.shape[:2]), starts=starts, initial=initial)

    def rows(z, p, initial, starts):
        return ema(z, p, starts=starts, initial=initial)

    for f, rates, spec in ((rows, p, split), (shared, p[:1], whole)):
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(split, spec, split, split), out_specs=split)
        for mine, theirs in zip(pulled(mapped, rates), pulled(f, rates), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("way", benchmark.WAYS)
def test_the_benchmark_compares_ways_to_the_same_result(way):
    z, p, _, _ = draw(2, 37, 5)
    (out, pull), (expected, pull_expected) = (jax.vjp(jax.jit(f), z, p) for f in (benchmark.WAYS[way], reference.ema))
    np.testing.assert_allclose(out, expected, atol=5e-6)
    for mine, theirs in zip(pull(expected), pull_expected(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_the_benchmark_runs():
    costs = benchmark.measure((1, 4, 8), jnp.dtype("float32"), repeats=1)
    assert set(costs) == set(benchmark.WAYS) and all(min(cost) > 0 for cost in costs.values())
