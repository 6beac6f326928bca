"""Grouped matmul and the grouped feed-forward against the masked sum over groups, values and gradients."""

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

from kernels_pallas.grouped_matmul import (
    blocks,
    gpu,
    grouped_matmul,
    grouped_swiglu,
    reference,
    routed_swiglu,
    swiglu,
    tpu,
)

pytestmark = pytest.mark.compiles

CASES = {
    "empty groups, rows past the last": (50, [0, 7, 0, 30, 0]),
    "every size of block": (700, [33, 0, 512, 1, 100]),
    "fewer rows than a block": (5, [2, 1, 2]),
}


def draw(*shapes, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [jnp.asarray(rng.standard_normal(shape) * scale, dtype) for shape in shapes]


def pulled(f, *args):
    """Result and all cotangents of f(*args[:-1]) for the result's cotangent args[-1]; args in one compilation."""

    def run(*args):
        out, pull = jax.vjp(f, *args[:-1])
        return out, *pull(args[-1])

    return jax.jit(run)(*args)


def assert_close(got, want, dtype=jnp.float32):
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


def plain_swiglu(rows, gate, up, down, sizes, activation):
    multiply = functools.partial(reference.grouped_matmul, group_sizes=sizes)
    act, hidden = swiglu.ACTIVATIONS[activation], multiply(rows, up)
    return multiply(act(hidden) if gate is None else act(multiply(rows, gate)) * hidden, down)


@settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    rest=st.integers(0, 20),
    k=st.integers(1, 12),
    n=st.integers(1, 12),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@example(sizes=[33, 0, 512, 1, 100], rest=54, k=6, n=10, dtype=jnp.float32)  # every size of block
@example(sizes=[0, 0], rest=40, k=6, n=10, dtype=jnp.float32)  # rows, and none of a group
@example(sizes=[0, 300, 0], rest=0, k=6, n=10, dtype=jnp.bfloat16)
def test_matmul_of_any_shape(sizes, rest, k, n, dtype):
    total = max(1, sum(sizes) + rest)
    rows, weights, d = draw((total, k), (len(sizes), k, n), (total, n), dtype=dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    got = pulled(lambda r, w: grouped_matmul(r, w, sizes), rows, weights, d)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    exact = [x.astype(jnp.float32) for x in (rows, weights, d)]  # the reference rounds a gradient once per group
    assert_close(got, pulled(lambda r, w: reference.grouped_matmul(r, w, sizes), *exact), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_swiglu(gated, activation):
    total, sizes = CASES["every size of block"]
    sizes = jnp.asarray(sizes, jnp.int32)
    g = sizes.size
    rows, gate, up, down, d = draw((total, 6), (g, 6, 9), (g, 6, 9), (g, 9, 6), (total, 6), scale=0.5)
    run = lambda f: pulled(  # noqa: E731
        lambda r, a, u, w: f(r, a if gated else None, u, w, sizes, activation), rows, gate, up, down, d
    )
    assert_close(run(grouped_swiglu), run(plain_swiglu))


@pytest.mark.parametrize("case", ["empty groups, rows past the last", "fewer rows than a block"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_swiglu_of_few_rows(case, dtype):
    total, sizes = CASES[case]
    sizes = jnp.asarray(sizes, jnp.int32)
    g = sizes.size
    args = draw((total, 6), (g, 6, 9), (g, 6, 9), (g, 9, 6), (total, 6), dtype=dtype, scale=0.5)
    got = pulled(lambda *a: grouped_swiglu(*a, sizes), *args)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    exact = [x.astype(jnp.float32) for x in args]
    assert_close(got, pulled(lambda *a: plain_swiglu(*a, sizes, "silu"), *exact), dtype)


def test_swiglu_by_matmuls_is_the_same_operation():
    """How accelerators compute it, here with the reference in place of their kernels."""
    total, sizes = CASES["empty groups, rows past the last"]
    sizes = jnp.asarray(sizes, jnp.int32)
    rows, gate, up, down, d = draw((total, 6), (5, 6, 9), (5, 6, 9), (5, 9, 6), (total, 6), scale=0.5)

    def pull_matmul(rows, weights, sizes, d):
        return jax.vjp(lambda r, w: reference.grouped_matmul(r, w, sizes), rows, weights)[1](d)

    options = {"activation": "silu"}
    by_blocks = swiglu.forward_by_blocks(rows, (gate, up), down, sizes, keep=True, **options)
    by_matmuls = swiglu.forward_by_matmuls(
        reference.grouped_matmul, rows, (gate, up), down, sizes, keep=True, **options
    )
    assert_close(jax.tree.leaves(by_matmuls), jax.tree.leaves(by_blocks))
    args = rows, (gate, up), down, sizes, by_blocks[1], d
    got = swiglu.backward_by_matmuls(pull_matmul, *args, **options)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(swiglu.backward_by_blocks(*args, **options)))


SLOTS = [16, 16, 16]


@pytest.mark.parametrize("sizes", [None, [33, 0, 400, 1], [3, 0, 14]])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_routed(sizes, dtype):
    """Gathered, multiplied, weighted and summed in one operation; three rows of every token, and some of none."""
    rows = 48 if sizes is None else sum(sizes) + 4
    groups, count = len(sizes or SLOTS), -(-rows // 3)
    rng = np.random.default_rng(rows)
    tokens, place = jnp.asarray(rng.permutation(np.arange(rows) // 3), jnp.int32), None
    if sizes:
        place = jnp.asarray(np.pad(np.argsort(tokens, kind="stable"), (0, 3 * count - rows), constant_values=rows))
        place = place.reshape(count, 3)
    x, scale, gate, up, down, d = draw(
        (count, 6), (rows,), (groups, 6, 9), (groups, 6, 9), (groups, 9, 6), (count, 6), dtype=dtype, scale=0.5
    )
    given = None if sizes is None else jnp.asarray(sizes, jnp.int32)
    shape = (rows,) if sizes else (groups, -1)
    arguments = x, scale.astype(jnp.float32).reshape(shape), gate, up, down, d.astype(jnp.float32)

    def routed(x, scale, gate, up, down):
        return routed_swiglu(x, tokens.reshape(shape), scale, gate, up, down, given, place=place)

    def plain(x, scale, *matrices):
        out = plain_swiglu(x[tokens], *matrices, given if sizes else jnp.array(SLOTS), "silu")
        return jnp.zeros(x.shape).at[tokens].add(out * scale.reshape(-1, 1))

    got = pulled(routed, *arguments)
    assert [a.dtype for a in got] == [jnp.float32, *(a.dtype for a in arguments[:-1])]
    assert_close(got, pulled(plain, *(a.astype(jnp.float32) for a in arguments)), dtype)


def test_swiglu_of_slots():
    args = draw((3, 16, 6), (3, 6, 9), (3, 6, 9), (3, 9, 6), (3, 16, 6), scale=0.5)
    flat = lambda rows, *matrices: plain_swiglu(rows.reshape(48, 6), *matrices, jnp.array(SLOTS), "silu")  # noqa: E731
    want = pulled(lambda *a: flat(*a).reshape(3, 16, 6), *args)
    assert_close(pulled(lambda *a: grouped_swiglu(*a, None), *args), want)


def test_finite_differences():
    rows, up, down = draw((12, 3), (3, 3, 4), (3, 4, 3), scale=0.7)
    sizes = jnp.array([5, 0, 6], jnp.int32)
    check = functools.partial(check_grads, order=1, modes=("rev",), eps=1e-3, atol=5e-3, rtol=5e-3)
    check(jax.jit(lambda *a: jnp.sin(grouped_swiglu(a[0], a[1], *a[1:], sizes))), (rows, up, down))
    check(jax.jit(lambda *a: jnp.sin(grouped_matmul(*a, sizes))), (rows, up))


def test_rows_past_the_last_group_are_not_even_looked_at():
    rows, gate, up, down, d = draw((50, 6), (2, 6, 9), (2, 6, 9), (2, 9, 6), (50, 6))
    sizes = jnp.array([7, 30], jnp.int32)
    got = pulled(
        lambda *a: grouped_swiglu(*a, sizes), rows.at[37:].set(jnp.nan), gate, up, down, d.at[37:].set(jnp.nan)
    )
    want = pulled(lambda *a: grouped_swiglu(*a, sizes), rows, gate, up, down, d)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(got[0][37:]).any() and not np.asarray(got[1][37:]).any()


def test_what_the_backward_pass_keeps():
    rows, gate, up, down = draw((50, 6), (2, 6, 9), (2, 6, 9), (2, 9, 6))
    sizes = jnp.array([7, 30], jnp.int32)
    _, pull = jax.vjp(lambda *a: grouped_swiglu(*a, sizes), rows, gate, up, down)
    assert sorted(x.shape for x in jax.tree.leaves(pull) if x.ndim == 2) == [(50, 6), (50, 9), (50, 9)]
    _, pull = jax.vjp(lambda *a: grouped_matmul(*a, sizes), rows, up)
    assert [x.shape for x in jax.tree.leaves(pull) if x.ndim == 2] == [(50, 6)]


@pytest.mark.parametrize("total, groups", [(4096, 64), (4096, 8), (5, 3), (1, 1), (300, 3), (700, 900)])
def test_blocks_are_of_few_sizes_and_the_largest_is_whole(total, groups):
    sizes = blocks.block_sizes(total, groups)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(blocks.MOST, total) and len(sizes) <= 8


def test_a_balanced_load_fills_its_blocks():
    rng = np.random.default_rng(0)
    rows = rng.multinomial(4096, [1 / 64] * 64)
    sizes = np.asarray(blocks.block_sizes(4096, 64))
    assert sizes[np.searchsorted(sizes, rows)].sum() < 1.15 * 4096


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_and_scan(check_vma):
    """Rows differ between devices, weights do not: their gradient is summed over devices, and nothing else moves."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "other"))
    rows, up, down, d = draw((2, 40, 6), (3, 6, 9), (3, 9, 6), (2, 40, 6))
    sizes = jnp.array([[10, 0, 25], [0, 40, 0]], jnp.int32)

    def local(rows, up, down, sizes):
        layer = lambda x, _: (x + grouped_swiglu(x, None, up, down, sizes[0]), None)  # noqa: E731
        out = jax.lax.scan(layer, rows[0], length=2)[0]
        return grouped_matmul(grouped_matmul(out, up, sizes[0]), down, sizes[0])[None]

    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(split, whole, whole, split), out_specs=split, check_vma=check_vma
    )

    def each(rows, up, down):
        return jnp.concatenate([local(rows[i : i + 1], up, down, sizes[i : i + 1]) for i in range(2)])

    got = pulled(lambda r, u, w: sharded(r, u, w, sizes), rows, up, down, d)
    assert_close(got, pulled(each, rows, up, down, d))


@pytest.mark.parametrize("total, sizes, k, n", [(300, [0, 130, 7, 100], 70, 40), (5, [2, 2], 16, 17)])
def test_gpu_kernels_interpreted(total, sizes, k, n):
    rows, weights, d = draw((total, k), (len(sizes), k, n), (total, n), scale=0.3)
    sizes = jnp.asarray(sizes, jnp.int32)
    want, *expected = pulled(lambda r, w: reference.grouped_matmul(r, w, sizes), rows, weights, d)
    run = lambda f, *args: jax.jit(functools.partial(f, interpret=True))(*args)  # noqa: E731
    assert_close([run(gpu.forward, rows, weights, sizes)], [want])
    assert_close(run(gpu.backward, rows, weights, sizes, d), expected)


@pytest.mark.parametrize(
    "total, sizes, k, n, interpret",
    [(600, [0, 130, 7, 300, 0], 70, 40, True), (5, [2, 2], 16, 17, True), (600, [0, 600, 0], 32, 40, False)],
)
def test_tpu_kernel_interpreted(total, sizes, k, n, interpret):
    rows, weights, d = draw((total, k), (len(sizes), k, n), (total, n), scale=0.3)
    sizes = jnp.asarray(sizes, jnp.int32)
    expected = pulled(lambda r, w: reference.grouped_matmul(r, w, sizes), rows, weights, d)[2]
    # Once with the simulator that refuses indices out of bounds and fills memory with NaN until it is written.
    got = tpu.outer(rows, d, weights, sizes, interpret=interpret or pltpu.InterpretParams())
    assert_close([got], [expected])


def test_tpu_by_ragged_dot():
    total, sizes = CASES["empty groups, rows past the last"]
    sizes = jnp.asarray(sizes, jnp.int32)
    rows, weights, d = draw((total, 6), (5, 6, 10), (total, 10))
    want, d_rows, _ = pulled(lambda r, w: reference.grouped_matmul(r, w, sizes), rows, weights, d)
    assert_close([tpu.forward(rows, weights, sizes)], [want])
    assert_close([tpu.transposed(d, weights, sizes)], [d_rows])


SIZES = [[0, 0], [0, 1000], [1, 999], [127, 129], [500, 0], [1000, 0], [128, 1], [0, 1]]


@pytest.mark.parametrize("sizes", SIZES)
def test_gpu_tiles_cover_every_row_once(sizes):
    group, first, end = (np.asarray(x) for x in gpu._tiles(jnp.asarray(sizes, jnp.int32), 1000, 128))
    owner = np.repeat([0, 1, 2], [*sizes, 1000 - sum(sizes)])
    rows = [(r, g) for g, f, e in zip(group, first, end, strict=True) for r in range(f, min(f + 128, e))]
    assert sorted(rows) == list(enumerate(owner))


@pytest.mark.parametrize("sizes", SIZES)
def test_tpu_visits_reach_every_row_of_a_group_once_and_every_group(sizes):
    group, tile, first, end = (np.asarray(x) for x in tpu._visits(jnp.asarray(sizes, jnp.int32), 1000, 128))
    owner = np.repeat([0, 1], sizes)
    rows = [
        (r, g)
        for g, t, f, e in zip(group, tile, first, end, strict=True)
        for r in range(max(f, t * 128), min(e, t * 128 + 128))
    ]
    assert sorted(rows) == list(enumerate(owner))
    assert (np.diff(group) >= 0).all() and set(group) == {0, 1}
    assert tile.min() >= 0 and tile.max() < 8


def test_what_does_not_fit_is_refused():
    rows, weights = jnp.ones((8, 4)), jnp.ones((2, 4, 3))
    sizes = jnp.array([4, 4], jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[R, K\], \[G, K, N\]"):
        grouped_matmul(rows, weights.transpose(0, 2, 1), sizes)
    with pytest.raises(ValueError, match="must be the same"):
        grouped_matmul(rows.astype(jnp.bfloat16), weights, sizes)
    with pytest.raises(ValueError, match="silu, gelu, relu"):
        grouped_swiglu(rows, None, weights, weights.transpose(0, 2, 1), sizes, "tanh")
