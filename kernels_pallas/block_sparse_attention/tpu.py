"""Block-sparse attention on TPUs: Pallas kernels that fetch the listed key blocks ahead, by lists in scalar memory.

Scores are held keys by queries, so that what softmax keeps of each query is a row of full registers, and a tile is
fetched once for all query heads that share it. The gradients of keys and values go through the visits key block by key
block; the query blocks of a key block follow one another, and its gradient stays in fast memory meanwhile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.block_sparse_attention import blocks as plain
from kernels_pallas.block_sparse_attention.table import WORD, transposed
from kernels_pallas.block_sparse_attention.tiles import LEAST, Blocks, Cut, Lists, Rule, bit_of, cost
from kernels_pallas.grouped_matmul.varying import shape_like

SCORES = 2**18  # of a tile
SLOTS = 3 * 2**15  # of the lists of one call: two numbers for each are below the 1 MiB of scalar memory
SUBLANES = 16  # rows of a register of 2-byte numbers
VMEM = 2**25  # bytes that a kernel may take
Interpret = bool | pltpu.InterpretParams


def forward(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, *, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """As `blocks.forward`."""
    if lists.table[0, 0].size > SLOTS:
        return plain.forward(rule, q, k, v, lists)
    cut = _cut(rule, q, k)
    out, lse = _by_calls(functools.partial(_attend, cut, interpret=interpret), cut.blocks(q, k, v, lists))
    return cut.results(out, lse, q.shape[2], v.shape[-1])


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
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `blocks.backward`."""
    if lists.table[0, 0].size > SLOTS:
        return plain.backward(rule, q, k, v, lists, out, lse, d_out, d_lse)
    cut = _cut(rule, q, k)
    blocks = cut.pulled(cut.blocks(q, k, v, lists), out, lse, d_out, d_lse)
    both = lambda blocks: (_pull_queries(cut, blocks, interpret), *_pull_keys(cut, blocks, interpret))  # noqa: E731
    d_q, d_k, d_v = _by_calls(both, blocks)
    d_q = cut.queries_back(d_q, q.shape[2], q.shape[-1])
    return d_q, cut.keys_back(d_k, k.shape[-1]), cut.keys_back(d_v, v.shape[-1])


def _cut(rule: Rule, q: jax.Array, k: jax.Array) -> Cut:
    group = q.shape[2] // k.shape[2]
    keys = pl.cdiv(rule.key_block, SUBLANES) * SUBLANES
    fitting = [n for n in range(1, group + 1) if group % n == 0 and n * rule.query_block * keys <= SCORES]
    heads = max(fitting, default=1)
    return Cut(rule, group // heads, pl.cdiv(heads * rule.query_block, SUBLANES) * SUBLANES, keys)


def _by_calls(run: Callable[[Blocks], Any], blocks: Blocks) -> Any:
    """What `run` makes of the blocks, each leaf [batch, kv_heads, ...]: in one call, or in one for each row and key
    head where the lists of all of them do not fit scalar memory."""
    if blocks.table.size <= SLOTS:
        return run(blocks)
    batch, kv_heads = blocks.k.shape[:2]

    positions = ("q_index", "k_index", "q_segments", "k_segments")

    def apart(name: str, x: jax.Array | None) -> Any:
        if x is None:
            return None
        x = x[:, None] if name in positions else x
        x = jnp.broadcast_to(x, (batch, kv_heads, *x.shape[2:]))
        return x.reshape(batch * kv_heads, *(() if name in positions else (1,)), 1, *x.shape[2:])

    each = Blocks(*(apart(name, x) for name, x in zip(Blocks._fields, blocks, strict=True)))
    return jax.tree.map(lambda x: x.reshape(batch, kv_heads, *x.shape[3:]), lax.map(run, each))


class _Operands:
    """Arrays of a call, each with the block that a visit (row, key head, set, query block, key block) sees of it."""

    def __init__(self, blocks: Blocks, visit: Callable[..., tuple[Any, ...]], names: tuple[str, ...]):
        self.blocks, self.visit, self.names = blocks, visit, tuple(n for n in names if self._of(blocks, n) is not None)

    @staticmethod
    def _of(blocks: Blocks, name: str) -> jax.Array | None:
        x = getattr(blocks, name)
        rows = ("lse", "delta", "q_index", "k_index", "q_segments", "k_segments")
        return x[..., None, :] if x is not None and name in rows else x

    def arrays(self) -> list[Any]:
        return [self._of(self.blocks, name) for name in self.names]

    def specs(self) -> list[pl.BlockSpec]:
        return [self.spec(name, self._of(self.blocks, name).shape) for name in self.names]  # type: ignore[union-attr]

    def spec(self, name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """That of an array of this shape, which is laid out as the one of this name."""

        def at(*ids_and_refs: Any) -> tuple[Any, ...]:
            b, h, m, i, block = self.visit(*ids_and_refs)
            row, head = (b if shape[0] > 1 else 0), (h if shape[1] > 1 else 0)
            lead = {
                "q_index": (row, i),
                "q_segments": (row, i),
                "k_index": (row, block),
                "k_segments": (row, block),
                "k": (b, h, block),
                "v": (b, h, block),
                "bits": (row, head, i),
            }.get(name, (b, h, m, i))
            return (*lead, 0, 0)

        return pl.BlockSpec((*(None,) * (len(shape) - 2), *shape[-2:]), at)

    def __call__(self, refs: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names, refs, strict=True))


SEEN = ("bits", "q_index", "k_index", "q_segments", "k_segments")


def _attend(cut: Cut, blocks: Blocks, *, interpret: Interpret) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp, as `Blocks.q` and `Blocks.lse`."""
    operands, grid, prefetched = _over_lists(blocks, ("q", "k", "v", *SEEN))
    rows, dim = blocks.q.shape[4], blocks.v.shape[-1]
    out = (*blocks.q.shape[:-1], dim)
    lse = (*blocks.q.shape[:-2], 1, rows)
    result = pl.pallas_call(
        functools.partial(_attend_kernel, cut=cut, operands=operands, row_of=_row_of(blocks)),
        out_shape=(shape_like(blocks.q, out), shape_like(blocks.q, lse, jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=operands.specs(),
            out_specs=(operands.spec("q", out), operands.spec("lse", lse)),
            scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32)] * 2 + [pltpu.VMEM((dim, rows), jnp.float32)],
        ),
        compiler_params=_params(),
        cost_estimate=cost(blocks, 2),
        interpret=interpret,
        name="block_sparse_attention",
    )(*prefetched, *operands.arrays())
    return result[0], result[1][..., 0, :]


def _attend_kernel(table_ref, counts_ref, *refs, cut, operands, row_of):
    *given, out_ref, lse_ref, most_ref, total_ref, sum_ref = refs
    of = operands(tuple(given))
    row, j, slots = row_of(), pl.program_id(4), pl.num_programs(4)

    @pl.when(j == 0)
    def _():
        most_ref[...] = jnp.full_like(most_ref, LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j < counts_ref[row])
    def _():
        scores = _scores(cut, of, table_ref[row * slots + j], j)
        most = jnp.maximum(most_ref[...], scores.max(0, keepdims=True))
        p, fade = jnp.exp(scores - most), jnp.exp(most_ref[...] - most)
        most_ref[...] = most
        total_ref[...] = fade * total_ref[...] + p.sum(0, keepdims=True)
        v = of["v"][...]
        sum_ref[...] = fade * sum_ref[...] + _dot(v, p.astype(v.dtype), 0, 0)

    @pl.when(j == slots - 1)
    def _():
        total = total_ref[...]
        out_ref[...] = (sum_ref[...] / jnp.where(total > 0, total, 1)).T.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(total > 0, most_ref[...] + jnp.log(total), -jnp.inf)


def _pull_queries(cut: Cut, blocks: Blocks, interpret: Interpret) -> jax.Array:
    """The gradient of the queries, as `Blocks.q`."""
    operands, grid, prefetched = _over_lists(blocks, ("q", "k", "v", "d_out", "lse", "delta", *SEEN))
    return pl.pallas_call(
        functools.partial(_pull_queries_kernel, cut=cut, operands=operands, row_of=_row_of(blocks)),
        out_shape=shape_like(blocks.q),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=operands.specs(),
            out_specs=operands.spec("q", blocks.q.shape),
            scratch_shapes=[pltpu.VMEM(blocks.q.shape[-2:], jnp.float32)],
        ),
        compiler_params=_params(),
        cost_estimate=cost(blocks, 3),
        interpret=interpret,
        name="block_sparse_attention_queries",
    )(*prefetched, *operands.arrays())


def _pull_queries_kernel(table_ref, counts_ref, *refs, cut, operands, row_of):
    *given, out_ref, sum_ref = refs
    of = operands(tuple(given))
    row, j, slots = row_of(), pl.program_id(4), pl.num_programs(4)

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j < counts_ref[row])
    def _():
        _, d_scores = _pulled(cut, of, table_ref[row * slots + j], j)
        k = of["k"][...]
        sum_ref[...] += _dot(d_scores.astype(k.dtype), k, 0, 0)

    @pl.when(j == slots - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _pull_keys(cut: Cut, blocks: Blocks, interpret: Interpret) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, as `Blocks.k` and `Blocks.v`."""
    (rows, heads, query_blocks, slots), key_blocks = blocks.table.shape, blocks.k.shape[2]
    visits = transposed(blocks.table, blocks.counts, key_blocks)
    size = query_blocks * slots
    list_of = lambda b, h: (b if rows > 1 else 0) * heads + (h if heads > 1 else 0)  # noqa: E731

    def visit(b, h, n, m, keys_ref, pairs_ref, totals_ref):
        at = list_of(b, h) * size + n
        return b, h, m, lax.div(pairs_ref[at], jnp.int32(slots)), keys_ref[at]

    operands = _Operands(blocks, visit, ("q", "k", "v", "d_out", "lse", "delta", *SEEN))
    d_k, d_v = pl.pallas_call(
        functools.partial(_pull_keys_kernel, cut=cut, operands=operands, list_of=list_of, slots=slots),
        out_shape=(shape_like(blocks.k), shape_like(blocks.v)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(*blocks.k.shape[:2], size, blocks.q.shape[2]),
            in_specs=operands.specs(),
            out_specs=tuple(operands.spec(name, getattr(blocks, name).shape) for name in ("k", "v")),
            scratch_shapes=[pltpu.VMEM(x.shape[-2:], jnp.float32) for x in (blocks.k, blocks.v)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost(blocks, 4),
        interpret=interpret,
        name="block_sparse_attention_keys",
    )(visits.keys.reshape(-1), visits.pairs.reshape(-1), visits.first[..., -1].reshape(-1), *operands.arrays())
    visited = (visits.first[..., 1:] > visits.first[..., :-1])[
        ..., None, None
    ]  # blocks without a visit are not written
    return jnp.where(visited, d_k, 0), jnp.where(visited, d_v, 0)


def _pull_keys_kernel(keys_ref, pairs_ref, totals_ref, *refs, cut, operands, list_of, slots):
    *given, d_k_ref, d_v_ref, k_sum_ref, v_sum_ref = refs
    of = operands(tuple(given))
    this, n, m = list_of(pl.program_id(0), pl.program_id(1)), pl.program_id(2), pl.program_id(3)
    end, sets = pl.num_programs(2) - 1, pl.num_programs(3)
    base = this * pl.num_programs(2)
    block = keys_ref[base + n]

    @pl.when((m == 0) & ((n == 0) | (keys_ref[base + jnp.maximum(n - 1, 0)] != block)))
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    @pl.when(n < totals_ref[this])
    def _():
        p, d_scores = _pulled(cut, of, block, lax.rem(pairs_ref[base + n], jnp.int32(slots)))
        q, d_out = of["q"][...], of["d_out"][...]
        v_sum_ref[...] += _dot(p.astype(d_out.dtype), d_out, 1, 0)
        k_sum_ref[...] += _dot(d_scores.astype(q.dtype), q, 1, 0)

    @pl.when((m == sets - 1) & ((n == end) | (keys_ref[base + jnp.minimum(n + 1, end)] != block)))
    def _():
        d_k_ref[...] = k_sum_ref[...].astype(d_k_ref.dtype)
        d_v_ref[...] = v_sum_ref[...].astype(d_v_ref.dtype)


def _scores(cut: Cut, of: dict[str, Any], block: jax.Array, slot: jax.Array) -> jax.Array:
    """f32[keys, rows] of a tile, -inf where not seen."""
    scores = cut.rule.scores(_dot(of["k"][...], of["q"][...], 1, 1))
    row = lambda name: of[name][...] if name in of else None  # noqa: E731
    column = lambda name: _column(of[name][...]) if name in of else None  # noqa: E731
    bit = None
    if "bits" in of:
        bit = jnp.broadcast_to(bit_of(of["bits"][pl.ds(lax.div(slot, jnp.int32(WORD)), 1), :], slot), scores.shape)
    offset = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    seen = cut.visible(block, offset, row("q_index"), column("k_index"), row("q_segments"), column("k_segments"), bit)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf)


def _pulled(cut: Cut, of: dict[str, Any], block: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[keys, rows] each: the softmax's weights of a tile, and the cotangents of the products of queries and keys."""
    scores = _scores(cut, of, block, slot)
    p = jnp.exp(scores - of["lse"][...])
    d_p = _dot(of["v"][...], of["d_out"][...], 1, 1)
    return p, p * (d_p - of["delta"][...]) * cut.rule.slope(scores)


def _over_lists(blocks: Blocks, names: tuple[str, ...]) -> tuple[_Operands, tuple[int, ...], tuple[jax.Array, ...]]:
    """Operands, grid and lists of a kernel that goes through the list of each query block."""
    (rows, heads, query_blocks, slots), sets = blocks.table.shape, blocks.q.shape[2]

    def visit(b, h, m, i, j, table_ref, counts_ref):
        row = ((b if rows > 1 else 0) * heads + (h if heads > 1 else 0)) * query_blocks + i
        return b, h, m, i, table_ref[row * slots + j]

    grid = (*blocks.k.shape[:2], sets, query_blocks, slots)
    return _Operands(blocks, visit, names), grid, (blocks.table.reshape(-1), blocks.counts.reshape(-1))


def _row_of(blocks: Blocks) -> Callable[[], jax.Array]:
    """In a kernel over lists: the number of its list among all."""
    rows, heads, query_blocks, _ = blocks.table.shape
    b = lambda: pl.program_id(0) if rows > 1 else 0  # noqa: E731
    h = lambda: pl.program_id(1) if heads > 1 else 0  # noqa: E731
    return lambda: (b() * heads + h()) * query_blocks + pl.program_id(3)


def _column(row: jax.Array) -> jax.Array:
    """i32[n, 1] of i32[1, n]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _params() -> pltpu.CompilerParams:
    """Of a kernel over lists, whose last axis is the place in a list."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    )
