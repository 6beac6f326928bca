"""Attention of a row's newest queries over its cache on TPUs: blocks of the cache pass through fast memory, in order.

A block holds the keys of all heads. XLA lays a cache out with channels along the lanes of a tile where they fill them,
else with slots: both are read as they are, because another layout would be a copy of the whole cache at each step.
Blocks that a row does not read are not fetched: their turn names one that is there already.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.decode_visits import block_of, by_key_head, by_query, cost, sees, visits
from kernels_pallas.grouped_matmul.varying import shape_like

BYTES = 2**20  # of the keys of a block in fast memory, which holds two blocks of keys and two of values
LANES = 128
MOST = 512  # keys of a block


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    window: int = 0,
    sinks: int = 0,
    soft_cap: float = 0.0,
    block: int = 0,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """As `decode.decode`, with lengths of 0 for rows that take no part. block: keys of a block; 0: by the shapes."""
    (rows, queries, _, dim), (slots, kv_heads) = q.shape, k.shape[1:3]
    across = dim % LANES == 0  # channels along lanes
    block = min(block or _block(k, across), slots)
    grouped = by_key_head(q, kv_heads)
    count = grouped.shape[2]
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -count % 8), (0, 0)))
    reads = visits(lengths, queries, window, sinks, block)
    tables = (*reads, _sources(reads.total))
    if across:
        cache = pl.BlockSpec((None, block, kv_heads, dim), lambda r, t, *of: (*fetched(r, t, *of), 0, 0))
    else:
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
        cache = pl.BlockSpec((None, kv_heads, dim, block), lambda r, t, *of: _spread(fetched(r, t, *of)))
    row = pl.BlockSpec((None, *grouped.shape[1:]), lambda r, t, *_: (r, 0, 0, 0))
    numbers = pltpu.VMEM((*grouped.shape[1:3], 1), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, across=across, queries=queries, limits=(window, sinks), soft_cap=soft_cap),
        out_shape=shape_like(q, grouped.shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(rows, pl.cdiv(slots, block)),
            in_specs=[row, cache, cache],
            out_specs=row,
            scratch_shapes=[pltpu.VMEM(grouped.shape[1:], jnp.float32), numbers, numbers],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost(q, k, v, slots),
        interpret=interpret,
        name="attention_decode",
    )(*tables, grouped, k, v)
    return by_query(out[:, :, :count], queries)


def fetched(row, turn, length, leading, first, total, source):
    """Row and block of the cache that are in fast memory at a turn of a row: its own, else the last or the next one."""
    of = source[row]
    last = jnp.maximum(total[of] - 1, 0)
    visit = jnp.where(of == row, jnp.minimum(turn, last), jnp.where(of < row, last, 0))
    return of, block_of(visit, leading[of], first[of])


def _spread(at):
    row, block = at
    return row, 0, 0, block


def _sources(total: jax.Array) -> jax.Array:
    """i32[rows]: of a row that reads nothing, the row before it that does, or else the first that does."""
    reads = total > 0
    before = lax.cummax(jnp.where(reads, jnp.arange(total.size, dtype=jnp.int32), -1))
    return jnp.where(before < 0, jnp.argmax(reads), before).astype(jnp.int32)


def _kernel(
    length_ref, leading_ref, first_ref, visits_ref, _, q_ref, k_ref, v_ref, out_ref, *scratch, across, **options
):
    row, turn = pl.program_id(0), pl.program_id(1)
    sums_ref, top_ref, total_ref = scratch

    @pl.when(turn == 0)
    def empty():
        sums_ref[...] = jnp.zeros_like(sums_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(turn < visits_ref[row])
    def add():
        at = block_of(turn, leading_ref[row], first_ref[row]) * k_ref.shape[0 if across else 2]
        for head in range(q_ref.shape[0]):
            carry = sums_ref[head], top_ref[head], total_ref[head]
            k, v = (ref[:, head, :] if across else ref[head] for ref in (k_ref, v_ref))
            added = _add(q_ref[head], k, v, at, length_ref[row], *carry, slots=0 if across else 1, **options)
            sums_ref[head], top_ref[head], total_ref[head] = added

    @pl.when(turn == pl.num_programs(1) - 1)
    def write():
        total = total_ref[...]
        out_ref[...] = (sums_ref[...] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)


def _add(q, k, v, at, length, sums, top, total, *, slots, queries, limits, soft_cap):
    """Sums, largest score and total of the queries [lines, dim] of a head, with a block of keys more.

    slots  the axis of k and v, [block, dim] or [dim, block], along which slots stand
    """
    shape = q.shape[0], k.shape[slots]
    slot = at + lax.broadcasted_iota(jnp.int32, shape, 1)
    ends = length - (queries - 1) + lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), queries)
    scores = _dot(q, k, 1 - slots) * q.shape[1] ** -0.5
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(sees(slot, ends, *limits), scores, -jnp.inf)
    there = at + lax.broadcasted_iota(jnp.int32, v.shape, slots) < length  # what lies behind must not reach the sum
    new = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    weights, kept = jnp.exp(scores - base), jnp.exp(top - base)
    added = _dot(weights.astype(v.dtype), jnp.where(there, v, 0), slots)
    return sums * kept + added, new, total * kept + weights.sum(axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a's last axis with an axis of b, summed in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _block(k: jax.Array, across: bool) -> int:
    """Keys of a block, a power of two. Fast memory holds 8 by 128 numbers of 4 bytes, or more that are smaller."""
    size, (heads, dim) = k.dtype.itemsize, k.shape[2:]
    lines = 32 // size
    each = pl.cdiv(heads, lines) * lines * dim if across else heads * pl.cdiv(dim, lines) * lines
    return min(MOST, max(16 if across else LANES, 2 ** (BYTES // (each * size)).bit_length() // 2))
