"""Attention on GPUs, interpreted, against the dense formula; and the tiles that it visits against the dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.attention import delta_of, gpu, tiles
from kernels_pallas.attention.seen import Seen

pytestmark = pytest.mark.compiles

SMALL = gpu.Blocks(gpu.Tile(32, 16), gpu.Tile(16, 32), gpu.Tile(16, 32))


def formula(q, k, v, d_out, seen, soft_cap=0.0):
    """Result, logarithm of the sum and gradients in float64, with every score in memory."""
    q, k, v, d_out = (np.asarray(x.astype(jnp.float32), np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))
    group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores, slope = q @ k.mT * scale, 1.0
    if soft_cap:
        slope = 1 - np.tanh(scores / soft_cap) ** 2
        scores = soft_cap * np.tanh(scores / soft_cap)
    mask = np.asarray(seen.mask(k.shape[2]))[:, None]
    exponentials = np.where(mask, np.exp(scores), 0)
    total = exponentials.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    weights = exponentials / np.where(total > 0, total, 1)
    d_weights = d_out @ v.mT
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope * scale
    shared = lambda x: x.reshape(len(x), -1, group, *x.shape[2:]).sum(2)  # noqa: E731
    out, d_q, d_k, d_v = weights @ v, d_scores @ k, shared(d_scores.mT @ q), shared(weights.mT @ d_out)
    return out.swapaxes(1, 2), lse, *(x.swapaxes(1, 2) for x in (d_q, d_k, d_v))


def causal(n, window=0, sinks=0):
    """All of the row, or the last `window` keys and the first `sinks`."""
    end = np.arange(1, n + 1, dtype=np.int32)[None]
    first = np.maximum(end - window, 0) if window else np.zeros_like(end)
    return Seen(first, end, np.full_like(end, sinks) if sinks else None)


def positions(rng, batch, n, of):
    return np.sort(np.stack([rng.choice(of, n, replace=False) for _ in range(batch)])).astype(np.int32)


def segments(rng, batch, n, q_at=None):
    """Causal among documents of random lengths, and some keys in the middle that do not exist."""
    tags = np.cumsum(rng.uniform(size=(batch, n)) < 0.06, axis=1).astype(np.int32)
    at = np.broadcast_to(np.arange(n, dtype=np.int32), (batch, n)) if q_at is None else q_at
    exists = rng.uniform(size=tags.shape) < 0.8
    exists[:, n // 2 : n // 2 + 33] = False
    return Seen(np.zeros_like(at), at + 1, None, np.take_along_axis(tags, at, 1), np.where(exists, tags, -1))


def both_ways(n, size):
    """Of documents of one size, everything."""
    tags = np.repeat(np.arange(n, dtype=np.int32), size)[None, :n].repeat(2, axis=0)
    return Seen(np.zeros_like(tags), np.full_like(tags, n), None, tags, tags)


def compacted(rng, batch, n, of, window):
    """Queries and keys at the same positions; the window is one of positions."""
    at = positions(rng, batch, n, of)
    first = np.stack([np.searchsorted(row, row - window, side="right") for row in at]).astype(np.int32)
    return Seen(first, np.broadcast_to(np.arange(1, n + 1, dtype=np.int32), at.shape))


def random(rng, batch, n_q, n_k):
    """Any intervals, empty ones among them, sinks and tags in any order."""
    first, end = (rng.integers(0, n_k + 1, (batch, n_q)).astype(np.int32) for _ in range(2))
    sinks = rng.integers(0, 20, (1, n_q)).astype(np.int32)
    return Seen(
        first, end, sinks, *(rng.integers(low, 3, (batch, n)).astype(np.int32) for low, n in ((0, n_q), (-1, n_k)))
    )


RNG = np.random.default_rng(0)
AT = positions(RNG, 2, 43, 129)
# Heads, heads of keys, head_dim, queries, keys, what is seen, cap of the scores. "random" has 16 channels of values.
CASES = {
    "causal, 15 heads over 5": (15, 5, 64, 129, 129, causal(129), 0.0),
    "window": (4, 2, 40, 129, 129, causal(129, 37), 0.0),
    "window and sinks": (2, 2, 32, 129, 129, causal(129, 20, 5), 0.0),
    "one": (3, 1, 64, 1, 1, causal(1), 0.0),
    "segments, some keys do not exist": (2, 1, 32, 129, 129, segments(RNG, 2, 129), 0.0),
    "both ways in documents of 40": (2, 1, 16, 129, 129, both_ways(129, 40), 0.0),
    "compacted": (2, 1, 32, 43, 43, compacted(RNG, 2, 43, 129, 30), 0.0),
    "compacted queries of all keys": (6, 2, 16, 43, 129, Seen(np.zeros_like(AT), AT + 1), 0.0),
    "the same in segments, capped": (2, 2, 40, 43, 129, segments(RNG, 2, 129, AT), 2.0),
    "random": (2, 1, 40, 50, 75, random(RNG, 2, 50, 75), 0.0),
}


def draw(heads, kv_heads, dim, queries, keys, dtype=np.float32, v_dim=None):
    """q, k, v and a cotangent of the result, of two rows."""
    rng = np.random.default_rng(0)
    q, k = (2, queries, heads, dim), (2, keys, kv_heads, dim)
    shapes = q, k, (*k[:3], v_dim or dim), (*q[:3], v_dim or dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def kernels(q, k, v, d_out, seen, soft_cap=0.0, blocks=SMALL):
    """Result, logarithm of the sum and gradients."""
    options = {"soft_cap": soft_cap, "blocks": blocks, "interpret": True}

    @jax.jit
    def run(q, k, v, d_out, seen):
        out, lse = gpu.forward(q, k, v, seen, **options)
        return out, lse, *gpu.backward(q, k, v, seen, delta_of(out, d_out), lse, d_out, **options)

    return [np.asarray(x.astype(jnp.float32)) for x in run(q, k, v, d_out, seen)]


def compare(mine, theirs):
    for x, y in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6, rtol=1e-5)
        assert x.shape == y.shape


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name):
    *shape, seen, soft_cap = CASES[name]
    given = *draw(*shape, v_dim=16 if name == "random" else None), seen, soft_cap
    compare(kernels(*given), formula(*given))


def test_a_query_that_sees_nothing_gives_nothing():
    seen = Seen(np.asarray([[0, 3, 5, 9, 0, 7, 6]], np.int32), np.asarray([[3, 3, 2, 7, 0, 0, 5]], np.int32))
    given = *draw(2, 2, 16, 7, 7), seen
    out, lse, d_q, *rest = kernels(*given)
    compare((out, lse, d_q, *rest), formula(*given))
    assert not out[:, 1:].any() and not d_q[:, 1:].any()
    assert (lse[..., 1:] == -np.inf).all() and np.isfinite(lse[..., 0]).all()


def test_half_precision_is_near_the_formula():
    given = *draw(6, 2, 64, 129, 129, jnp.bfloat16), causal(129)
    for x, y in zip(kernels(*given, blocks=None), formula(*given), strict=True):
        assert np.abs(x - y).max() < 0.015 * np.abs(y).max()


def test_results_have_the_dtypes_of_what_they_belong_to():
    q, k, v, d_out = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in draw(2, 1, 16, 4, 9))
    seen = Seen(*[jax.ShapeDtypeStruct((1, 4), jnp.int32)] * 2)
    out, lse = jax.eval_shape(gpu.forward, q, k, v, seen)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 2, 4), jnp.float32)
    assert jax.eval_shape(gpu.backward, q, k, v, seen, lse, lse, d_out) == (q, k, v)


def test_inside_shard_map_each_device_has_its_rows():
    *shape, seen, soft_cap = CASES["segments, some keys do not exist"]
    q, k, v, d_out = draw(*shape)
    forward = functools.partial(gpu.forward, soft_cap=soft_cap, blocks=SMALL, interpret=True)
    split = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    mapped = jax.shard_map(forward, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    compare(jax.jit(mapped)(q, k, v, seen), formula(q, k, v, d_out, seen)[:2])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][3] > 7])
def test_visits_are_the_tiles_in_which_something_is_seen(name):
    _, _, _, queries, keys, seen, _ = CASES[name]
    mask = np.broadcast_to(np.asarray(seen.mask(keys)), (2, queries, keys))
    rows, columns = visits(seen, 2, queries, keys, 16, 32)
    check(rows, mask, 16, 32)
    check(columns, mask.swapaxes(1, 2), 32, 16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def tables(seen, batch, queries, keys, block_q, block_k):
    chosen = tiles.tiles(tiles.padded(seen, batch, keys, block_q, block_k), queries, keys, block_q, block_k)
    return tiles.by_rows(chosen), tiles.by_columns(chosen)


def visits(*args):
    """The tables of blocks of queries, and of blocks of keys."""
    return map(np.asarray, tables(*args))


def check(table, mask, block, across):
    """That a table visits every tile of `mask` in which anything is seen, once, and whole tiles without a mask."""
    for row, visits in zip(mask, table, strict=True):
        for i, (leading, begin, full, full_end, masked) in enumerate(visits):
            partial = tiles.visited(np.arange(masked), leading, begin, full, full_end).tolist()
            every = [*partial, *range(full, full_end)]
            assert len({*every}) == len(every)
            lines = row[i * block : (i + 1) * block]
            of = [lines[:, j * across : (j + 1) * across] for j in range(-(-lines.shape[1] // across))]
            assert {j for j, tile in enumerate(of) if tile.any()} <= {*every} <= {*range(len(of))}
            assert all(of[j].all() for j in range(full, full_end))


def test_a_window_in_a_long_row_visits_few_blocks():
    n, block = 4096, 64
    rows, _ = visits(causal(n, 128, 4), 1, n, n, block, block)
    _, _, full, full_end, masked = rows[0].T
    assert (masked + full_end - full).max() == 4 and (full_end - full)[8] == 1


def test_whole_tiles_of_a_document_need_no_mask():
    """Documents of 256 positions, the last 100 keys do not exist."""
    n, block = 1024, 64
    tags = np.arange(n, dtype=np.int32)[None] // 256
    seen = causal(n)._replace(q_tags=tags, k_tags=np.where(np.arange(n) < n - 100, tags, -1))
    rows, _ = visits(seen, 1, n, n, block, block)
    _, begin, full, full_end, masked = rows[0].T
    np.testing.assert_array_equal((full_end - full)[:14], [0, 1, 2, 3] * 3 + [0, 1])
    np.testing.assert_array_equal(masked[:14], 1)
    np.testing.assert_array_equal(begin[:12], np.repeat([0, 4, 8], 4))
