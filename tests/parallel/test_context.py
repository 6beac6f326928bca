"""Attention and recurrences over a split sequence are those of the whole one, and send what their formulas say."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from adaptive.parallel.config import ContextParallel, MeshConfig
from adaptive.parallel.context import attention, block_sparse, dense, recurrent, ring
from adaptive.parallel.context.axis import Context
from adaptive.parallel.context.choice import Shapes, chosen, sent
from adaptive.parallel.context.halo import extended
from adaptive.parallel.context.layout import Layout, exchanged
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, placement
from kernels_pallas.attention import Places
from kernels_pallas.block_sparse_attention import block_sparse_attention, from_choices
from kernels_pallas.ssd import ssd

RNG = np.random.default_rng(0)
AXIS, ROWS, SEQ, HEADS, KV_HEADS, DIM = "context", 2, 32, 4, 2, 8
SPLIT, BY_BLOCK = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def documents(seq=SEQ):
    """Some begin within a part, and some run through several."""
    return np.sort(RNG.integers(1, 5, (ROWS, seq)), axis=1).astype(np.int32)


def over(parts, local, inputs=SPLIT, outputs=SPLIT):
    """`local` on each device's part."""
    mesh = Mesh(np.array(jax.devices()[:parts]), (AXIS,))
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def pulled(fn, cotangents, *inputs):
    """Collectives by kind of the program for fn(*inputs) and its gradients, before compilers join equal ones (for
    accelerators they do not: test_context_aot.py), and both results."""

    def program(cotangents, *inputs):
        out, pull = jax.vjp(fn, *inputs)
        return out, *pull(cotangents)

    lowered = jax.jit(program).lower(cotangents, *inputs)
    kinds = re.findall(r"stablehlo\.(collective_permute|all_gather|reduce_scatter)\"", lowered.as_text())
    return collections.Counter(kinds), lowered.compile()(cotangents, *inputs)


def formula(q, k, v, g, mask):
    """The result and its gradients, in float64, where every query sees something."""
    q, k, v, g = (x.astype(np.float64) for x in (q, k, v, g))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    keys, values = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.where(mask[:, None], np.einsum("bqhd,bkhd->bhqk", q, keys) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = np.einsum("bqhd,bkhd->bhqk", g, values)
    d_s = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * scale
    of_group = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)  # noqa: E731
    d_k, d_v = np.einsum("bhqk,bqhd->bkhd", d_s, q), np.einsum("bhqk,bqhd->bkhd", p, g)
    out, d_q = np.einsum("bhqk,bkhd->bqhd", p, values), np.einsum("bhqk,bkhd->bqhd", d_s, keys)
    return out, d_q, of_group(d_k), of_group(d_v)


def seen(q_at, k_at, window=0, causal=True, segments=None):
    """bool[rows, queries, keys] of positions [rows, n]."""
    far = q_at[:, :, None] - k_at[:, None, :]
    mask = (far >= 0) if causal else np.ones(far.shape, bool)
    mask = mask & (far < window) if window else mask
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def assert_close(got, want, atol=3e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(np.abs(b).max())))


def permutations(schedule, parts, nodes):
    """Collective-permutes in the text of a result and its gradients; a loop's once."""
    local, most = parts // nodes, ring.UNROLLED
    chunks = 2 if parts > 2 else 1  # of two parts one chunk of each stays
    zigzag = 2 * 4 * chunks  # q, k, v there and the result back, and their gradients
    steps = 1 if local - 1 > most else local - 1  # forwards
    first = 0 if local == 1 else 1 + (1 if local - 2 > most else local - 2)  # backwards: the first step stands apart
    there = 2 * nodes * (steps + first)  # keys and values
    home = 2 * nodes * (0 if local == 1 else first + 1)  # their gradients
    across = 2 * 2 * (nodes - 1) + (2 * nodes if nodes > 1 else 0)
    return {
        "ring": zigzag + there + home + across,
        "both_ways": zigzag + 2 * (there + home + across),
        "token_ring": zigzag + 2 * (parts - 1) * (1 + 2 + 4 + 1),  # halves of: q; result, sum; 4 of each row; d_q
        "gather": 2 * 2 * chunks,
    }[schedule]


CASES = {  # schedule, parts, nodes, how
    "ring of 2": ("ring", 2, 1, {}),
    "ring of 4, documents": ("ring", 4, 1, {"segments": documents()}),
    "ring of 8 in 2 nodes, window": ("ring", 8, 2, {"window": 11}),
    "both ways of 4 in 2 nodes": ("both_ways", 4, 2, {"segments": documents()}),
    "token ring of 4, documents": ("token_ring", 4, 1, {"segments": documents()}),
    "gathered from 4": ("gather", 4, 1, {}),
}


@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
def test_every_schedule_is_attention_and_sends_what_its_formula_says(name, monkeypatch):
    schedule, parts, nodes, how = CASES[name]
    how = dict(how)
    monkeypatch.setattr(ring, "UNROLLED", 1)  # fewer steps to compile
    q, k, v, g = (normal(ROWS, SEQ, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    at = np.broadcast_to(np.arange(SEQ), (ROWS, SEQ))
    want = formula(q, k, v, g, seen(at, at, **how))
    segments = how.pop("segments", None)

    def local(q, k, v, s):
        places = Places(None, None, s, s)
        return dense.attention(Context(AXIS, parts, nodes), q, k, v, places, schedule=schedule, **how)

    sent, got = pulled(lambda *x: over(parts, local)(*x, segments), g, q, k, v)
    assert_close(got, want)
    assert sent["collective_permute"] == permutations(schedule, parts, nodes)
    assert sent["all_gather"] == 2 * (segments is not None) + 2 * (schedule == "gather")  # tags; keys and values


@pytest.mark.compiles
def test_a_window_takes_what_it_reaches_and_nothing_else():
    """Two parts before its own, the second of them not whole; keys that do not exist, positions with gaps."""
    q, k, v, g = (normal(ROWS, SEQ, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    at = np.sort(np.stack([RNG.choice(2 * SEQ, SEQ, replace=False) for _ in range(ROWS)]), axis=1).astype(np.int32)
    exists = RNG.random((ROWS, SEQ)) < 0.8
    exists = exists | ~(seen(at, at, 11) & exists[:, None, :]).any(-1)  # every query sees something
    mask = seen(at, at, 11) & exists[:, None, :]

    def local(q, k, v, at, exists):
        places = Places(at, at, None, None, exists)
        return dense.attention(Context(AXIS, 4), q, k, v, places, window=11)  # 10 of 24 earlier slots, at most

    sent, got = pulled(lambda *x: over(4, local)(*x, at, exists), g, q, k, v)
    assert_close(got, formula(q, k, v, g, mask))
    # Keys, values and who exists from two parts, gradients of keys and values back; positions of all.
    assert sent == {"all_gather": 1, "collective_permute": 2 * (2 + 1 + 2)}


@pytest.mark.compiles
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_zigzag_there_and_back(parts):
    x, layout = np.arange(2 * parts * 3)[None], Layout(parts, True)

    def local(x):
        turned = exchanged(x, layout, AXIS)
        return turned, exchanged(turned, layout, AXIS, back=True)

    turned, back = jax.jit(over(parts, local))(x)
    chunks = x.reshape(2 * parts, 3)
    want = [chunks[c] for r in range(parts) for c in (r, 2 * parts - 1 - r)]
    np.testing.assert_array_equal(turned[0], np.concatenate(want))
    np.testing.assert_array_equal(back, x)


@pytest.mark.compiles
def test_some_queries_and_all_keys_on_a_mesh():
    """As layers call it: lengths that do not divide over the axis, few queries of many keys, and rows over data."""
    queries, keys = 21, 30
    q, k, v, g = (normal(ROWS, n, heads, DIM)
                  for n, heads in ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (queries, HEADS)))  # fmt: skip
    at = np.sort(np.stack([RNG.choice(keys, queries, replace=False) for _ in range(ROWS)]), axis=1).astype(np.int32)
    want = formula(q, k, v, g, seen(at, np.broadcast_to(np.arange(keys), (ROWS, keys))))
    run = lambda q, k, v: attention(q, k, v, Places(at), causal=True)  # noqa: E731
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with placement(mesh, AxisRules(), context=ContextParallel("ring")):
        sent, got = pulled(run, g, q, k, v)
    assert_close(got, want)
    assert sent["collective_permute"] == permutations("ring", 4, 1)


@pytest.mark.compiles
def test_block_sparse_attention_is_that_of_the_whole_sequence():
    """Choices of each query, documents, lists for each query head, and gradients of the log-sum-exp, too."""
    parts, block, seq = 2, 4, 32
    q, k, v, g = (normal(ROWS, seq, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    chosen = RNG.random((ROWS, HEADS, seq, seq // block)) < 0.4
    table, bits, _ = from_choices(jnp.asarray(chosen), block, 6)
    s, sizes = documents(seq), {"query_block": block, "key_block": block}
    finite = lambda out, lse: (out, jnp.where(jnp.isfinite(lse), lse, 0))  # noqa: E731

    def local(q, k, v, table, counts, bits, s):
        return block_sparse.block_sparse_attention(
            Context(AXIS, parts), q, k, v, table, counts, row_bits=bits, segments=(s, s), **sizes
        )

    specs = (SPLIT,) * 3 + (BY_BLOCK,) * 3 + (SPLIT,)
    split = over(parts, local, specs, (SPLIT, BY_BLOCK))
    whole = functools.partial(block_sparse_attention, row_bits=bits, q_segments=s, k_segments=s, with_lse=True, **sizes)
    cotangents = g, normal(ROWS, HEADS, seq)
    _, got = pulled(lambda *x: finite(*split(*x, *table, bits, s)), cotangents, q, k, v)
    _, want = pulled(lambda *x: finite(*whole(*x, *table)), cotangents, q, k, v)
    assert_close(got, want)


@pytest.mark.compiles
def test_a_state_goes_through_every_part():
    """Documents within parts and across them; one part has the end of a document and no beginning."""
    parts, seq, n = 8, 48, 3
    inputs = [normal(ROWS, seq, 2, 4), np.abs(normal(ROWS, seq, 2)) * 0.3, -np.exp(normal(2)),
              normal(ROWS, seq, n), normal(ROWS, seq, n), normal(ROWS, 2, 4, n)]  # fmt: skip
    s = np.repeat([[1, 1, 1, 2, 2, 3], [1, 2, 3, 3, 3, 3]], [5, 9, 8, 8, 8, 10], axis=1).astype(np.int32)
    cotangents = normal(*inputs[0].shape), normal(ROWS, 2, 4, n)

    def local(x, dt, a, b, c, state, s):
        return recurrent.ssd(Context(AXIS, parts), x, dt, a, b, c, segments=s, state=state, block=8)

    whole = PartitionSpec()
    split = over(parts, local, (SPLIT, SPLIT, whole, SPLIT, SPLIT, whole, SPLIT), (SPLIT, whole))
    sent, got = pulled(lambda *x: split(*x, s), cotangents, *inputs)
    one = lambda x, dt, a, b, c, state: ssd(x, dt, a, b, c, segments=s, state=state, block=8)  # noqa: E731
    _, want = pulled(one, cotangents, *inputs)
    assert_close(got, want, 1e-5)
    assert sent["collective_permute"] == 1  # the segment before a part


@pytest.mark.compiles
def test_what_precedes_a_part():
    """More than a part, and what was before the row."""
    x, first = np.arange(1, 17)[None], np.arange(-5, 0)[None]
    out = jax.jit(over(8, lambda x: extended(x, AXIS, 8, 5, first)))(x)
    row = np.concatenate([first, x], axis=1)[0]
    np.testing.assert_array_equal(out.reshape(8, 7), [row[2 * r : 2 * r + 7] for r in range(8)])


def test_the_cheapest_schedule_is_chosen():
    """By bytes: of few keys all are gathered; neighbours have links both ways on TPUs; without groups of heads queries
    are smaller than keys, values and their float32 gradients."""
    long = Shapes(rows=1, queries=16384, keys=16384, heads=32, kv_heads=8, head_dim=128, itemsize=2)
    choose = functools.partial(chosen, parts=8, nodes=1, reach=None, causal=True, platform="gpu")
    assert choose("auto", long) == "ring" == choose("ring", long._replace(keys=64, queries=64))
    assert choose("auto", long, platform="tpu") == "both_ways"
    assert choose("auto", long._replace(kv_heads=1), platform="tpu") == "ring" == choose("both_ways", long, parts=2)
    assert choose("auto", long._replace(kv_heads=32)) == "token_ring"
    assert choose("auto", long._replace(kv_heads=32), nodes=2) == "ring"
    assert choose("auto", long._replace(queries=512, keys=512)) == "gather"
    assert choose("ring", long, reach=4095) == "halo" and choose("ring", long, reach=10**6) == "ring"
    assert sent("token_ring", long, 8) > sent("ring", long, 8)
    a_pass = 2 * 16384 * 8 * 128
    assert sent("ring", long, 8) == 7 * 2 * a_pass * 2 + 8 * a_pass * 4
