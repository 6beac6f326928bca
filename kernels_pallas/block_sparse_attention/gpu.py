"""Block-sparse attention on NVIDIA GPUs: Pallas kernels on Triton that go through each list up to its count.

A program computes up to 128 rows of a query block, or 64 keys of a key block in the gradients of keys and values, fewer
of wide heads; larger blocks are several programs with one list. Small query blocks are filled up with the query heads
that share a key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.block_sparse_attention.table import WORD, transposed
from kernels_pallas.block_sparse_attention.tiles import LEAST, Blocks, Cut, Lists, Rule, bit_of, cost
from kernels_pallas.grouped_matmul.varying import shape_like

ROWS, KEYS = 128, 64  # of a tile, at most
WIDTH = 256  # bytes of a head up to which tiles are so large: wider ones leave less shared memory for rows
SIDE = 16  # of a matrix, at least, for Triton's dot


def forward(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `blocks.forward`."""
    cut = _cut(rule, q, k)
    blocks, parts = _in_parts(cut.blocks(q, k, v, lists))
    shape = blocks.q.shape[:-1]
    out, lse = _call(
        _attend_kernel,
        cut,
        parts,
        blocks,
        (shape_like(blocks.q, (*shape, blocks.v.shape[-1])), shape_like(blocks.q, shape, jnp.float32)),
        matmuls=2,
        interpret=interpret,
        name="block_sparse_attention",
    )
    return cut.results(_whole(out, 3, parts[0]), _whole(lse, 3, parts[0]), q.shape[2], v.shape[-1])


def backward(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `blocks.backward`."""
    cut = _cut(rule, q, k)
    blocks = cut.pulled(cut.blocks(q, k, v, lists), out, lse, d_out, d_lse)
    visits = transposed(blocks.table, blocks.counts, rule.key_blocks)
    blocks, parts = _in_parts(blocks)
    call = functools.partial(_call, cut=cut, parts=parts, blocks=blocks, interpret=interpret)
    d_q = call(_pull_queries_kernel, out=shape_like(blocks.q), matmuls=3, name="block_sparse_attention_queries")
    d_k, d_v = call(
        _pull_keys_kernel,
        out=(shape_like(blocks.k), shape_like(blocks.v)),
        matmuls=4,
        name="block_sparse_attention_keys",
        visits=(visits.pairs, visits.first),
    )
    d_q = cut.queries_back(_whole(d_q, 3, parts[0]), q.shape[2], q.shape[-1])
    d_k, d_v = (_whole(x, 2, parts[1]) for x in (d_k, d_v))
    return d_q, cut.keys_back(d_k, k.shape[-1]), cut.keys_back(d_v, v.shape[-1])


def _cut(rule: Rule, q: jax.Array, k: jax.Array) -> Cut:
    group = q.shape[2] // k.shape[2]
    heads = max((n for n in range(1, group + 1) if group % n == 0 and n * rule.query_block <= KEYS), default=1)
    return Cut(rule, group // heads, _side(heads * rule.query_block), _side(rule.key_block), _side)


def _in_parts(blocks: Blocks) -> tuple[Blocks, tuple[int, int]]:
    """Blocks whose query and key blocks are cut into parts of a tile's size, as more blocks; tables and bits stay. And
    how many parts they have."""
    rows, keys = blocks.q.shape[4], blocks.k.shape[3]
    width = max(blocks.q.shape[-1], blocks.v.shape[-1]) * blocks.q.dtype.itemsize
    smaller = max(1, width // WIDTH)
    parts = max(1, rows // max(SIDE, ROWS // smaller)), max(1, keys // max(SIDE, KEYS // smaller))

    def split(x: jax.Array | None, axis: int, count: int) -> jax.Array | None:
        if x is None or count == 1:
            return x
        shape = x.shape
        return x.reshape(*shape[:axis], shape[axis] * count, shape[axis + 1] // count, *shape[axis + 2 :])

    axes = {
        "q": (3, 0), "d_out": (3, 0), "lse": (3, 0), "delta": (3, 0), "q_index": (1, 0), "q_segments": (1, 0),
        "k": (2, 1), "v": (2, 1), "k_index": (1, 1), "k_segments": (1, 1),
    }  # fmt: skip
    made: dict[str, Any] = {
        name: split(getattr(blocks, name), axis, parts[side]) for name, (axis, side) in axes.items()
    }
    return blocks._replace(**made), parts


def _whole(x: jax.Array, axis: int, count: int) -> jax.Array:
    """x with the parts of its blocks together again."""
    shape = x.shape
    return x.reshape(*shape[:axis], shape[axis] // count, shape[axis + 1] * count, *shape[axis + 2 :])


def _call(
    kernel: Any,
    cut: Cut,
    parts: tuple[int, int],
    blocks: Blocks,
    out: Any,
    matmuls: int,
    interpret: bool,
    name: str,
    visits: tuple[jax.Array, ...] = (),
) -> Any:
    """A program for each part of a query block of each set of heads; with `visits` for each part of a key block."""
    (batch, kv_heads, sets, queries, *_), keys = blocks.q.shape, blocks.k.shape[2]
    given = {field: x for field, x in blocks._asdict().items() if x is not None}
    operands = [*visits, *given.values()]

    def run(*refs: Any) -> None:
        of = dict(zip(given, refs[len(visits) : len(operands)], strict=True))
        kernel(cut, parts, of, *refs[: len(visits)], *refs[len(operands) :])

    return pl.pallas_call(
        run,
        out_shape=out,
        grid=(keys, kv_heads, batch) if visits else (queries, sets * kv_heads, batch),
        compiler_params=plt.CompilerParams(num_warps=8 if blocks.q.shape[-1] > 64 else 4, num_stages=2),
        cost_estimate=cost(blocks, matmuls),
        interpret=interpret,
        name=name,
    )(*operands)


def _attend_kernel(cut, parts, of, out_ref, lse_ref):
    i, (b, h, m) = pl.program_id(0), _head(of)
    q = of["q"][b, h, m, i]

    def step(t, carry):
        most, total, out = carry
        j, key = lax.div(t, _i32(parts[1])), lax.rem(t, _i32(parts[1]))
        block = _table(of, b, h, lax.div(i, _i32(parts[0])), j)
        scores = _scores(cut, parts, of, q, b, h, i, block, key, j)
        new = jnp.maximum(most, scores.max(-1))
        p, fade = jnp.exp(scores - new[:, None]), jnp.exp(most - new)
        v = of["v"][b, h, block * parts[1] + key]
        return new, fade * total + p.sum(-1), fade[:, None] * out + plt.dot(p.astype(v.dtype), v)

    rows, dim = q.shape[0], of["v"].shape[-1]
    start = jnp.full((rows,), LEAST, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, dim), jnp.float32)
    most, total, out = lax.fori_loop(0, _count(of, parts, b, h, i), step, start)
    out_ref[b, h, m, i] = (out / jnp.where(total > 0, total, 1)[:, None]).astype(out_ref.dtype)
    lse_ref[b, h, m, i] = jnp.where(total > 0, most + jnp.log(total), -jnp.inf)


def _pull_queries_kernel(cut, parts, of, out_ref):
    i, (b, h, m) = pl.program_id(0), _head(of)
    q, d_out, lse, delta = (of[name][b, h, m, i] for name in ("q", "d_out", "lse", "delta"))

    def step(t, d_q):
        j, key = lax.div(t, _i32(parts[1])), lax.rem(t, _i32(parts[1]))
        block = _table(of, b, h, lax.div(i, _i32(parts[0])), j)
        scores = _scores(cut, parts, of, q, b, h, i, block, key, j)
        at = block * parts[1] + key
        k, v = of["k"][b, h, at], of["v"][b, h, at]
        d_p = plt.dot(d_out, v, trans_b=True)
        d_scores = jnp.exp(scores - lse[:, None]) * (d_p - delta[:, None]) * cut.rule.slope(scores)
        return d_q + plt.dot(d_scores.astype(k.dtype), k)

    d_q = lax.fori_loop(0, _count(of, parts, b, h, i), step, jnp.zeros(q.shape, jnp.float32))
    out_ref[b, h, m, i] = d_q.astype(out_ref.dtype)


def _pull_keys_kernel(cut, parts, of, pairs_ref, first_ref, d_k_ref, d_v_ref):
    at, h, b = (pl.program_id(axis) for axis in range(3))
    block, key = lax.div(at, _i32(parts[1])), lax.rem(at, _i32(parts[1]))
    row, head = _list(of["table"], b, h)
    k, v = of["k"][b, h, at], of["v"][b, h, at]
    sets, slots = of["q"].shape[2], of["table"].shape[3]

    first, end = first_ref[row, head, block], first_ref[row, head, block + 1]

    def step(t, carry):
        d_k, d_v = carry
        pair = pairs_ref[row, head, first + lax.div(t, _i32(sets * parts[0]))]
        m, part = lax.div(lax.rem(t, _i32(sets * parts[0])), _i32(parts[0])), lax.rem(t, _i32(parts[0]))
        i, j = lax.div(pair, _i32(slots)) * parts[0] + part, lax.rem(pair, _i32(slots))
        q, d_out, lse, delta = (of[name][b, h, m, i] for name in ("q", "d_out", "lse", "delta"))
        scores = _scores(cut, parts, of, q, b, h, i, block, key, j)
        p = jnp.exp(scores - lse[:, None])
        d_p = plt.dot(d_out, v, trans_b=True)
        d_scores = p * (d_p - delta[:, None]) * cut.rule.slope(scores)
        d_v += plt.dot(p.astype(d_out.dtype), d_out, trans_a=True)
        return d_k + plt.dot(d_scores.astype(q.dtype), q, trans_a=True), d_v

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_k, d_v = lax.fori_loop(0, (end - first) * (sets * parts[0]), step, start)
    d_k_ref[b, h, at] = d_k.astype(d_k_ref.dtype)
    d_v_ref[b, h, at] = d_v.astype(d_v_ref.dtype)


def _scores(cut, parts, of, q, b, h, i, block, key, j):
    """f32[rows, keys] of part i of the query blocks and part `key` of a key block, -inf where not seen."""
    at = block * parts[1] + key
    scores = cut.rule.scores(plt.dot(q, of["k"][b, h, at], trans_b=True))
    rows, keys = scores.shape

    def position(name: str, at: Any) -> jax.Array:
        return of[name][b if of[name].shape[0] > 1 else 0, at]

    row = lambda name: None if name not in of else position(name, i)[:, None]  # noqa: E731
    column = lambda name: None if name not in of else position(name, at)[None, :]  # noqa: E731
    bit = None
    if "bits" in of:
        some, head = _list(of["bits"], b, h)
        at_rows = pl.ds(lax.rem(i, _i32(parts[0])) * rows, rows)
        words = of["bits"][some, head, lax.div(i, _i32(parts[0])), lax.div(j, _i32(WORD)), at_rows]
        bit = jnp.broadcast_to(bit_of(words, j)[:, None], scores.shape)
    offset = key * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = cut.visible(block, offset, row("q_index"), column("k_index"), row("q_segments"), column("k_segments"), bit)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf)


def _head(of):
    """Row, key head and set of a program of queries."""
    sets, n = _i32(of["q"].shape[2]), pl.program_id(1)
    return pl.program_id(2), lax.div(n, sets), lax.rem(n, sets)


def _list(table, b, h):
    """Where a row and a key head find theirs."""
    return (b if table.shape[0] > 1 else 0), (h if table.shape[1] > 1 else 0)


def _table(of, b, h, i, j):
    row, head = _list(of["table"], b, h)
    return of["table"][row, head, i, j]


def _count(of, parts, b, h, i):
    """How many parts of key blocks a part of a query block visits."""
    row, head = _list(of["counts"], b, h)
    return of["counts"][row, head, lax.div(i, _i32(parts[0]))] * parts[1]


def _i32(x: int) -> np.int32:
    return np.int32(x)


def _side(size: int) -> int:
    return max(SIDE, pl.next_power_of_2(size))
