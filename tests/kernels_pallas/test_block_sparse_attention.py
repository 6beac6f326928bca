"""Block-sparse attention: every form against dense attention under the mask of each pattern that it serves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from adaptive.benchmarks import block_sparse_attention as benchmark
from kernels_pallas.block_sparse_attention import (
    block_sparse_attention,
    blocks,
    from_choices,
    from_map,
    gpu,
    reference,
    runs_on,
    tpu,
)
from kernels_pallas.block_sparse_attention.tiles import Lists, Rule
from kernels_pallas.choice import target

pytestmark = pytest.mark.compiles

FORMS = {"blocks": (blocks, {}), "tpu": (tpu, {"interpret": True}), "gpu": (gpu, {"interpret": True})}
# One program for all patterns of a rule: the last blocks are cut short, and lists of 6 hold all key blocks.
BATCH, SEQ, HEADS, KV_HEADS, DIM, BLOCK, SLOTS = 2, 44, 4, 2, 8, 8, 6
COUNT = -(-SEQ // BLOCK)
CAUSAL = Rule(BLOCK, BLOCK, SEQ, SEQ, DIM, True, 0, 0, 0.0)
WINDOW = Rule(BLOCK, BLOCK, SEQ, SEQ, DIM, True, 11, 3, 1.5)
EITHER_SIDE = Rule(BLOCK, BLOCK, SEQ, SEQ, DIM, False, 11, 3, 0.0)
q_at, k_at = np.arange(SEQ)[:, None], np.arange(SEQ)[None, :]
q_block, k_block = np.arange(COUNT)[:, None], np.arange(COUNT)[None, :]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((*shape, seed)).standard_normal(shape), dtype)


def inputs(batch=BATCH, queries=SEQ, keys=SEQ, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, dtype=jnp.float32):
    """q, k, v, and cotangents of the result and of the log-sum-exp; values are wider than keys."""
    value_dim = dim + 4
    q, k = normal(batch, queries, heads, dim, dtype=dtype), normal(batch, keys, kv_heads, dim, seed=1, dtype=dtype)
    v, d_out = normal(batch, keys, kv_heads, value_dim, seed=2, dtype=dtype), normal(batch, queries, heads, value_dim)
    return (q, k, v), (d_out.astype(dtype), normal(batch, heads, queries))


@functools.cache
def program(form, rule):
    """(q, k, v, lists, d_out, d_lse) -> out, lse and the three gradients, by a form."""
    module, options = FORMS[form]

    def both(q, k, v, lists, d_out, d_lse):
        out, lse = module.forward(rule, q, k, v, lists, **options)
        return out, lse, *module.backward(rule, q, k, v, lists, out, lse, d_out, d_lse, **options)

    return jax.jit(both)


@functools.partial(jax.jit, static_argnames="soft_cap")
def dense(q, k, v, mask, d_out, d_lse, soft_cap=0.0):
    """The same by automatic differentiation of dense attention under a mask."""
    (out, lse), pull = jax.vjp(lambda q, k, v: reference.masked(q, k, v, mask, soft_cap), q, k, v)
    return out, lse, *pull((d_out, d_lse))


def close(got, expected, tolerance=2e-6):
    for mine, theirs in zip(got, expected, strict=True):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(theirs))
        mine, theirs = np.nan_to_num(mine, neginf=0), np.nan_to_num(theirs, neginf=0)
        assert np.abs(mine - theirs).max() <= tolerance * max(1, np.abs(theirs).max())


def tokens(visited):
    """bool[..., SEQ, SEQ] of a map over blocks."""
    return np.repeat(np.repeat(visited, BLOCK, -2), BLOCK, -1)[..., :SEQ, :SEQ]


def everywhere(x, *shape):
    return jnp.asarray(np.broadcast_to(x, shape))


def lists_of(table, bits=None, index=None, segments=None):
    """All arguments given, whether a pattern needs them or not, in the shapes that `program` is compiled for once."""
    shape = BATCH, KV_HEADS, COUNT
    bits = np.uint32(2**32 - 1) if bits is None else bits
    return Lists(
        everywhere(table.blocks, *shape, SLOTS),
        everywhere(table.counts, *shape),
        everywhere(bits, *shape, BLOCK, 1),
        *(everywhere(np.arange(SEQ, dtype=np.int32) if index is None else index, BATCH, SEQ),) * 2,
        *(everywhere(np.int32(1) if segments is None else segments, BATCH, SEQ),) * 2,
    )


# Patterns: lists, and bool[batch or 1, heads or 1, SEQ, SEQ] by each one's own formula.


def documents():
    """Random blocks of random documents with padding, at positions with gaps; some lists are empty."""
    rng = np.random.default_rng(0)
    visited = rng.random((BATCH, KV_HEADS, COUNT, COUNT)) < 0.6
    visited[:, 0, 2] = False
    index = np.sort(rng.choice(3 * SEQ, (BATCH, SEQ)), axis=1).astype(np.int32)
    segments = np.asarray([[1, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0]], np.int32)
    segments = np.repeat(segments, 4, axis=1)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    mask = (same & (index[:, None, :] <= index[:, :, None]))[:, None]
    mask = np.repeat(tokens(visited), HEADS // KV_HEADS, 1) & mask
    return lists_of(from_map(visited, SLOTS)[0], index=index, segments=segments), mask, index


def strided():
    """Local blocks, and every third column of blocks, which each head counts from another."""
    head = np.arange(KV_HEADS)[:, None, None]
    visited = (k_block <= q_block) & ((q_block - k_block < 2) | ((k_block + head) % 3 == 0))
    mask = np.repeat(tokens(visited), HEADS // KV_HEADS, 0) & (k_at <= q_at)
    return lists_of(from_map(visited[None], SLOTS)[0]), mask[None]


def vertical_slash():
    """Whole diagonals of blocks that hold a diagonal of tokens, and blocks with a column (MTraining, section 2)."""
    diagonals, columns = ([0, 13], [0, 24]), ([2], [19, 35])
    visited = np.zeros((KV_HEADS, COUNT, COUNT), bool)
    for head in range(KV_HEADS):
        for s in diagonals[head]:
            far = q_block - k_block
            visited[head] |= ((far - 1) * BLOCK < s) & (s < (far + 1) * BLOCK)
        visited[head][:, [c // BLOCK for c in columns[head]]] = True
    visited &= k_block <= q_block
    mask = np.repeat(tokens(visited), HEADS // KV_HEADS, 0) & (k_at <= q_at)
    queries = np.arange(24, SEQ)
    assert mask[2, queries, queries - 24].all() and mask[0, queries, 2].all()  # what they are for
    return lists_of(from_map(visited[None], SLOTS)[0]), mask[None]


def bi_level():
    """A region visits itself, the one before, and of earlier ones the two that the queries before it score highest."""
    (q, k, _), _ = inputs()
    pad = [(0, 0), (0, COUNT * BLOCK - SEQ), (0, 0), (0, 0)]
    q = np.pad(q, pad).reshape(BATCH, COUNT, BLOCK, KV_HEADS, -1, DIM).mean((2, 4)).transpose(0, 2, 1, 3)
    k = np.pad(k, pad).reshape(BATCH, COUNT, BLOCK, KV_HEADS, DIM).mean(2).transpose(0, 2, 1, 3)
    before = np.concatenate([q[:, :, :1], q[:, :, :-1]], axis=2)
    scores = np.einsum("bhid,bhjd->bhij", before, k)
    forced = (q_block - k_block == 0) | (q_block - k_block == 1)
    table, _ = from_map(np.broadcast_to(k_block <= q_block, scores.shape), 4, np.where(forced, 1e9, scores))
    mask = np.zeros((BATCH, KV_HEADS, COUNT, COUNT), bool)
    for b, h, i in np.ndindex(BATCH, KV_HEADS, COUNT):
        earlier = np.argsort(-scores[b, h, i, : max(i - 1, 0)])[:2]
        mask[b, h, i, [i, max(i - 1, 0), *earlier]] = True
    table = table._replace(blocks=jnp.pad(table.blocks, [(0, 0)] * 3 + [(0, SLOTS - 4)], mode="edge"))
    return lists_of(table), np.repeat(tokens(mask), HEADS // KV_HEADS, 1) & (k_at <= q_at)


def selected(most=3):
    """bool[batch, kv_heads, SEQ, COUNT]: of each query and key head the first block, its own, and a random one before
    it, as NSA selects (section 3.3)."""
    rng = np.random.default_rng(4)
    own = np.arange(SEQ) // BLOCK
    chosen = np.zeros((BATCH, KV_HEADS, SEQ, COUNT), bool)
    chosen[..., 0] = True
    chosen[..., np.arange(SEQ), own] = True
    some = (rng.random((BATCH, KV_HEADS, SEQ)) * (own + 1)).astype(int)
    np.put_along_axis(chosen, some[..., None], True, axis=-1)
    assert chosen.sum(-1).max() == most
    return chosen


def by_union():
    """NSA's selection in blocks of queries: the union of what they selected, and bits of each."""
    chosen = selected()
    table, bits, _ = from_choices(chosen, BLOCK, SLOTS)
    mask = np.repeat(np.repeat(chosen, BLOCK, -1)[..., :SEQ], HEADS // KV_HEADS, 1)
    return lists_of(table, bits), mask & (k_at <= q_at)


PATTERNS = {f.__name__: f for f in (documents, strided, vertical_slash, bi_level, by_union)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_form_is_dense_attention_under_the_pattern(pattern, form):
    lists, mask, *_ = PATTERNS[pattern]()
    given, cotangents = inputs()
    close(program(form, CAUSAL)(*given, lists, *cotangents), dense(*given, jnp.asarray(mask), *cotangents))


@pytest.mark.parametrize("form", FORMS)
def test_a_window_with_sinks_and_a_soft_cap(form):
    near = (q_block - k_block <= -(-(WINDOW.window - 1) // BLOCK)) & (k_block <= q_block)
    table, _ = from_map(near | (k_block == 0), SLOTS)
    mask = (k_at <= q_at) & ((k_at > q_at - WINDOW.window) | (k_at < WINDOW.sinks))
    given, cotangents = inputs()
    expected = dense(*given, jnp.asarray(mask)[None, None], *cotangents, soft_cap=WINDOW.soft_cap)
    close(program(form, WINDOW)(*given, lists_of(table), *cotangents), expected)


def test_a_window_to_either_side():
    table, _ = from_map(np.ones((COUNT, COUNT), bool), SLOTS)
    mask = ((np.abs(k_at - q_at) < 11) | (k_at < 3)) & (k_at < q_at + 11)
    given, cotangents = inputs()
    got = program("blocks", EITHER_SIDE)(*given, lists_of(table), *cotangents)
    close(got, dense(*given, jnp.asarray(mask)[None, None], *cotangents))


def test_a_choice_of_each_query_head():
    """MoBA: the own block and the two of best mean key, per query and query head; keys are shared by heads."""
    (q, k, v), cotangents = inputs()
    whole = SEQ // BLOCK * BLOCK
    means = np.asarray(k)[:, :whole].reshape(BATCH, -1, BLOCK, KV_HEADS, DIM).mean(2)
    scores = np.einsum("bthd,bnhd->bhtn", q, np.repeat(means, HEADS // KV_HEADS, 2))
    own = np.arange(SEQ) // BLOCK
    chosen = np.zeros((BATCH, HEADS, SEQ, COUNT), bool)
    for b, h, t in np.ndindex(BATCH, HEADS, SEQ):
        chosen[b, h, t, [own[t], *np.argsort(-scores[b, h, t, : own[t]])[:2]]] = True
    table, bits, _ = from_choices(chosen, BLOCK, COUNT)
    options = {"query_block": BLOCK, "key_block": BLOCK, "row_bits": bits, "with_lse": True}
    (out, lse), pull = jax.vjp(jax.jit(lambda *a: block_sparse_attention(*a, *table, **options)), q, k, v)
    mask = np.repeat(chosen, BLOCK, -1)[..., :SEQ] & (k_at <= q_at)
    close((out, lse, *pull(cotangents)), dense(q, k, v, jnp.asarray(mask), *cotangents))


@pytest.mark.parametrize("form", FORMS)
def test_a_list_for_every_query(form):
    """NSA's selection row by row: the rows of a tile are the heads of a group."""
    chosen = selected()
    (blocks_, counts), _ = from_map(chosen, 3)
    given, cotangents = inputs()
    rule = Rule(1, BLOCK, SEQ, SEQ, DIM, True, 0, 0, 0.0)
    got = program(form, rule)(*given, Lists(blocks_, counts, None, None, None, None, None), *cotangents)
    mask = np.repeat(np.repeat(chosen, BLOCK, -1)[..., :SEQ], HEADS // KV_HEADS, 1) & (k_at <= q_at)
    close(got, dense(*given, jnp.asarray(mask), *cotangents))


def test_clusters_of_tokens():
    """Routing Transformer: each head's members of a cluster lie together, and see those of it at earlier positions."""
    rng = np.random.default_rng(5)
    clusters, size = 3, 2 * BLOCK
    members = np.sort(rng.permuted(np.tile(np.arange(64), (BATCH * HEADS, clusters, 1)), axis=-1)[..., :size], axis=-1)
    index = jnp.asarray(members.reshape(BATCH * HEADS, -1), jnp.int32)  # heads are rows: each has positions of its own
    given, cotangents = inputs(BATCH * HEADS, clusters * size, clusters * size, 1, 1)
    cluster = np.arange(clusters * size) // size
    block = cluster[::BLOCK]
    visited = (block[:, None] == block[None, :]) & (np.arange(6)[None, :] <= np.arange(6)[:, None])
    table, _ = from_map(visited[None, None], 2)

    def run(q, k, v):
        return block_sparse_attention(
            q, k, v, *table, query_block=BLOCK, key_block=BLOCK, q_index=index, k_index=index, with_lse=True
        )

    (out, lse), pull = jax.vjp(jax.jit(run), *given)
    mask = (cluster[:, None] == cluster[None, :]) & (index[:, None, :] <= index[:, :, None])
    close((out, lse, *pull(cotangents)), dense(*given, mask[:, None], *cotangents))


def test_generation_step_by_step_is_the_whole():
    """One query to a row, each row with a list and a position of its own, over keys of which later ones are missing."""
    (q, k, v), cotangents = inputs()
    whole = program("blocks", CAUSAL)(q, k, v, by_union()[0], *cotangents)[0]
    chosen = selected()
    (blocks_, counts), _ = from_map(chosen, 3)
    step = jax.jit(functools.partial(block_sparse_attention, query_block=1, key_block=BLOCK))
    for t in (0, 7, 8, 43):
        at = np.asarray([t, max(t - 1, 0)])
        rows = np.arange(BATCH)
        table = blocks_[rows, :, at][:, :, None], counts[rows, :, at][:, :, None]
        index = jnp.asarray(at, jnp.int32)[:, None]
        there = (np.arange(SEQ) <= at[:, None])[..., None, None]
        out = step(q[rows, at][:, None], jnp.where(there, k, 7), jnp.where(there, v, 7), *table, q_index=index)
        np.testing.assert_allclose(out[:, 0], whole[rows, at], atol=1e-6)


@st.composite
def shapes(draw):
    """Batch, heads and key heads, queries and keys, their blocks, channels, slots of a list, and a seed of what it
    holds; the first that is drawn has one of each."""
    batch, group, kv_heads = (draw(st.integers(1, 3)) for _ in range(3))
    queries, keys = (draw(st.integers(1, 40)) for _ in range(2))
    block = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    slots = draw(st.integers(1, -(-keys // block[1]) + 1))
    return (
        batch,
        group * kv_heads,
        kv_heads,
        queries,
        keys,
        block,
        draw(st.integers(1, 40)),
        slots,
        draw(st.integers(0)),
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes())
def test_any_shape(form, shape):
    batch, heads, kv_heads, queries, keys, (query_block, key_block), dim, slots, seed = shape
    tiles = batch, 1, -(-queries // query_block), -(-keys // key_block)
    table, _ = from_map(np.random.default_rng(seed).random(tiles) < 0.6, slots)
    arrays, cotangents = inputs(batch, queries, keys, heads, kv_heads, dim)
    options = {"query_block": query_block, "key_block": key_block, "causal": False}
    expected = jax.jit(functools.partial(reference.block_sparse_attention, **options))
    (out, lse), pull = jax.vjp(lambda *a: expected(*a, *table), *arrays)
    rule = Rule(query_block, key_block, queries, keys, dim, False, 0, 0, 0.0)
    got = program(form, rule)(*arrays, Lists(*table, None, None, None, None, None), *cotangents)
    close(got, (out, lse, *pull(cotangents)))


@pytest.mark.parametrize(("form", "sizes"), [("gpu", {"ROWS": 16, "KEYS": 16}), ("tpu", {"SCORES": 24 * 32})])
def test_blocks_larger_than_a_tile(form, sizes, monkeypatch):
    """Parts of a block with one list, and query heads of a key head one after another."""
    for name, size in sizes.items():
        monkeypatch.setattr(FORMS[form][0], name, size)
    chosen = np.random.default_rng(6).random((BATCH, 1, SEQ, 2)) < 0.6
    table, bits, _ = from_choices(chosen, 24, 2)
    given, cotangents = inputs()
    got = program(form, Rule(24, 24, SEQ, SEQ, DIM, True, 0, 0, 0.0))(
        *given, Lists(*table, bits, None, None, None, None), *cotangents
    )
    mask = np.repeat(chosen, 24, -1)[..., :SEQ] & (k_at <= q_at)
    close(got, dense(*given, jnp.asarray(mask), *cotangents))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_within_its_bounds(form):
    lists, mask = strided()
    half, cotangents = inputs(dtype=jnp.bfloat16)
    wide, wide_cotangents = jax.tree.map(lambda x: x.astype(jnp.float32), (half, cotangents))
    got = program(form, CAUSAL)(*half, lists, *cotangents)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    close(got, dense(*wide, jnp.asarray(mask), *wide_cotangents), 1e-2)


def test_strict_simulation_of_the_kernels_for_tpus(monkeypatch):
    """Memory that was not written is not a number there, reads past an end raise; a key block is visited by nobody."""
    monkeypatch.setitem(FORMS, "strict", (tpu, {"interpret": pltpu.InterpretParams()}))
    rule = Rule(BLOCK, BLOCK, 12, 20, DIM, False, 0, 0, 0.0)
    table, _ = from_map(np.asarray([[1, 0, 0], [1, 0, 1]], bool)[None, None], 2)
    given, cotangents = inputs(1, 12, 20, 2, 1)
    lists = Lists(*table, None, None, None, None, None)
    got = program("strict", rule)(*given, lists, *cotangents)
    options = {"query_block": BLOCK, "key_block": BLOCK, "causal": False}
    (out, lse), pull = jax.vjp(lambda *a: reference.block_sparse_attention(*a, *table, **options), *given)
    close(got, (out, lse, *pull(cotangents)))
    assert not got[3][:, BLOCK : 2 * BLOCK].any()


def test_lists_that_scalar_memory_cannot_hold(monkeypatch):
    """One call for each row and key head; with a single list too long, the form of other machines."""
    lists, mask, *_ = documents()
    given, cotangents = inputs()
    expected = dense(*given, jnp.asarray(mask), *cotangents)
    monkeypatch.setattr(tpu, "SLOTS", COUNT * SLOTS)
    program.cache_clear()
    close(program("tpu", CAUSAL)(*given, lists, *cotangents), expected)
    monkeypatch.setattr(tpu, "SLOTS", COUNT * SLOTS - 1)
    assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(tpu.forward, CAUSAL))(*given, lists))
    program.cache_clear()


def test_key_blocks_that_nobody_lists_are_not_read():
    lists, _ = strided()
    given, cotangents = inputs()
    lost = np.asarray([[2, 4], [1, 5]])  # key blocks of each head, taken from all lists
    visited = np.array((k_block <= q_block) & np.ones((KV_HEADS, 1, 1), bool))
    for head in range(KV_HEADS):
        visited[head][:, lost[head]] = False
    lists = lists_of(from_map(visited[None], SLOTS)[0])
    there = np.ones((1, COUNT, BLOCK, KV_HEADS), bool)
    for head in range(KV_HEADS):
        there[:, lost[head], :, head] = False
    there = there.reshape(1, -1, KV_HEADS)[:, :SEQ, :, None]
    q, k, v = given
    run = program("blocks", CAUSAL)
    got = run(q, jnp.where(there, k, jnp.nan), jnp.where(there, v, jnp.nan), lists, *cotangents)
    close(got, run(*given, lists, *cotangents))


def test_steps_follow_the_lists(monkeypatch):
    """In XLA too: as many tiles are computed as the longest list of each query block has entries, forth and back."""
    visited, real = [], blocks._tiles

    def counted(cut, given, row, j):
        jax.debug.callback(visited.append, j)
        return real(cut, given, row, j)

    monkeypatch.setattr(blocks, "_tiles", counted)
    monkeypatch.setattr(blocks, "KEYS", BLOCK)
    program.cache_clear()
    lists, _, _ = documents()
    given, cotangents = inputs()
    jax.block_until_ready(program("blocks", CAUSAL)(*given, lists, *cotangents))
    jax.effects_barrier()
    program.cache_clear()
    assert len(visited) == 2 * int(lists.counts.max((0, 1)).sum())


def test_results_over_disjoint_keys_are_merged_with_their_gradients():
    """What the log-sum-exp and its gradient are for."""
    given, (d_out, _) = inputs()
    everything = (k_block <= q_block)[None, None]
    own = (k_block == q_block)[None, None]
    parts = [from_map(visited, SLOTS)[0] for visited in (own, everything & ~own)]
    run = functools.partial(block_sparse_attention, query_block=BLOCK, key_block=BLOCK, with_lse=True)

    @jax.jit
    def merged(q, k, v):
        (out, lse), (more, more_lse) = (run(q, k, v, *table) for table in parts)
        both = jnp.logaddexp(lse, more_lse)
        weight = lambda part: jnp.exp(part - both).swapaxes(1, 2)[..., None]  # noqa: E731
        return out * weight(lse) + more * weight(more_lse)

    @jax.jit
    def whole(q, k, v):
        return run(q, k, v, *from_map(everything, SLOTS)[0])[0]

    pulled = [jax.vjp(f, *given) for f in (merged, whole)]
    close((pulled[0][0], *pulled[0][1](d_out)), (pulled[1][0], *pulled[1][1](d_out)))


def test_rows_and_heads_over_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    lists, mask = strided()
    given, (d_out, _) = inputs(batch=4)
    split = PartitionSpec("data", None, "tensor")

    def run(q, k, v, table, counts):
        return block_sparse_attention(q, k, v, table, counts, query_block=BLOCK, key_block=BLOCK)

    specs = (split, split, split, *[PartitionSpec(None, "tensor")] * 2)  # lists are the same for all rows
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=split)
    table = lists.table[:1], lists.counts[:1]
    out, pull = jax.vjp(jax.jit(lambda *a: mapped(*a, *table)), *given)
    expected = dense(*given, jnp.asarray(mask), d_out, jnp.zeros((4, HEADS, SEQ)))
    close((out, *pull(d_out)), (expected[0], *expected[2:]))


GOOD = {
    "q": ((2, 20, 4, 8), "float32"), "k": ((2, 30, 2, 8), "float32"), "v": ((2, 30, 2, 5), "float32"),
    "table": ((2, 2, 3, 4), "int32"), "counts": ((2, 2, 3), "int32"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ((2, 20, 4), "float32")}, r"q is \(2, 20, 4\): must be"),
        ({"k": ((2, 0, 2, 8), "float32")}, r"k is \(2, 0, 2, 8\)"),
        ({"v": ((2, 30, 2, 5), "bfloat16")}, "v is bfloat16, q float32: must be the same"),
        ({"q": ((2, 20, 4, 8), "int32")}, "q is int32.*float32 or bfloat16"),
        ({"k": ((2, 30, 3, 8), "float32"), "v": ((2, 30, 3, 8), "float32")}, "kv_heads a divisor of q's heads"),
        ({"v": ((2, 29, 2, 5), "float32")}, r"v \(2, 29, 2, 5\)"),
        ({"table": ((2, 3, 4), "int32")}, r"table is \(2, 3, 4\): must be \[batch or 1"),
        ({"table": ((2, 2, 4, 4), "int32")}, r"must be \[2 or 1, 1 or 2 or 4, 3, slots\].*20 queries in blocks of 8"),
        ({"table": ((2, 3, 3, 4), "int32")}, "must be .2 or 1, 1 or 2 or 4, 3, slots."),
        ({"table": ((2, 2, 3, 4), "uint8")}, r"table is uint8.*must be int32\[2, 2, 3, 4\]"),
        ({"counts": ((2, 2, 3, 1), "int32")}, r"counts is int32\[2, 2, 3, 1\]: must be int32\[2, 2, 3\]"),
        ({"row_bits": ((2, 2, 3, 8, 2), "uint32")}, r"row_bits is .* must be uint32\[2, 2, 3, 8, 1\]"),
        ({"q_index": ((2, 30), "int32")}, r"q_index is .* must be int32\[2, 20\] or int32\[1, 20\]"),
        ({"k_segments": ((2, 30), "int32")}, "q_segments and k_segments: must both be given"),
        ({"query_block": 0}, "query_block is 0: must be at least 1"),
        ({"key_block": 2**16}, "must be at most 262144"),
        ({"window": -1}, "window is -1"),
        ({"sinks": 2}, "sinks is 2 and window 0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
    ],
)
def test_what_does_not_match_is_refused(change, message):
    given = {"query_block": 8, "key_block": 8, **GOOD, **change}
    arguments = {k: jax.ShapeDtypeStruct(*x) if isinstance(x, tuple) else x for k, x in given.items()}
    arrays = {k: x for k, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    sizes = {k: x for k, x in arguments.items() if k not in arrays}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda a: block_sparse_attention(**a, **sizes), arrays)


@pytest.mark.parametrize(
    ("entries", "count", "message"),
    [
        ([0, 2, 1], 3, "ascending"),
        ([0, 1, 1], 3, "at most once"),
        ([0, 1, 6], 3, "0 to 5"),
        ([-1, 0, 1], 3, "0 to 5"),
        ([0, 1, 2], 4, "counts: must be 0 to 3"),
    ],
)
def test_lists_are_looked_at_where_checks_are_on(entries, count, message, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CHECKS", "1")
    q, k, v = (normal(1, 48, 1, 4, seed=seed) for seed in range(3))
    run = functools.partial(block_sparse_attention, query_block=48, key_block=8, causal=False)
    table, counts = jnp.asarray(entries, jnp.int32).reshape(1, 1, 1, 3), jnp.full((1, 1, 1), count, jnp.int32)
    with pytest.raises(ValueError, match=message):
        run(q, k, v, table, counts)


def test_checks_within_a_compiled_program(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CHECKS", "1")
    q, k, v = (normal(1, 48, 1, 4, seed=seed) for seed in range(3))
    run = jax.jit(functools.partial(block_sparse_attention, query_block=48, key_block=8, causal=False))
    table, counts = jnp.asarray([[[[1, 0, 0]]]], jnp.int32), jnp.full((1, 1, 1), 1, jnp.int32)
    jax.block_until_ready(run(q, k, v, table, counts))  # what does not count may be anything in range
    with pytest.raises(jax.errors.JaxRuntimeError, match="ascending"):
        jax.block_until_ready(run(q, k, v, table, counts + 1))
        jax.effects_barrier()


def test_xla_alone_where_it_is_asked_for():
    (q, k, v), _ = inputs()
    lists, _ = strided()
    run = functools.partial(block_sparse_attention, query_block=BLOCK, key_block=BLOCK)
    for platform, kernels, found in (("tpu", "auto", True), ("gpu", "auto", True), ("tpu", "reference", False)):
        with target(platform, kernels):
            text = str(jax.make_jaxpr(lambda *a: run(*a))(q, k, v, lists.table, lists.counts))  # of a function for each
            assert ("pallas_call" in text) == found


def test_it_says_what_computes_it():
    assert [runs_on(platform).split()[0] for platform in ("tpu", "gpu", "cpu")] == ["Pallas", "Pallas", "listed"]


def test_the_benchmark_compares_ways_to_one_result(monkeypatch):
    monkeypatch.setattr(benchmark, "BLOCK", 16)
    monkeypatch.setattr(benchmark, "SLOTS", (1,))
    assert [share for share, _ in benchmark.ways(32).values()] == [2 / 3, 1.0, 1.0]
    monkeypatch.setattr(benchmark, "SLOTS", ())
    costs = benchmark.measure(32, jnp.dtype("float32"), repeats=1)
    assert all(cost.forward_s > 0 and cost.both_s > 0 for cost in costs.values())
    q, k, v = normal(1, 32, 4, 8), normal(1, 32, 2, 8), normal(1, 32, 2, 8, seed=1)
    close(*([way(q, k, v)] for _, way in benchmark.ways(32).values()))
