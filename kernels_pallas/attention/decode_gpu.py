"""Attention of a row's newest queries over its cache on NVIDIA GPUs: a Pallas kernel on Triton.

The blocks of a row that are read are split over programs, so that few rows keep the whole device busy; what these give
is put together by the logarithms of their sums (Flash-Decoding, Dao et al. 2023).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.attention.decode_visits import block_of, by_key_head, by_query, cost, sees, visits
from kernels_pallas.grouped_matmul.varying import shape_like

LEAST = 16  # the side of a matrix that Triton's dot takes
LOG2E = math.log2(math.e)
BYTES = 16384  # of the keys of a block
PROGRAMS = 264  # two on each processor of an H100 or H200
PARAMS = plt.CompilerParams(num_warps=4, num_stages=3)


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
    splits: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """As `decode.decode`, with lengths of 0 for rows that take no part.

    block, splits  keys of a block, and programs that share a row and a head; 0: by the shapes
    """
    (rows, queries, heads, dim), (slots, kv_heads) = q.shape, k.shape[1:3]
    wide, lines = _side(dim), _side(queries * heads // kv_heads)
    block = block or min(_side(slots), max(LEAST, BYTES // (wide * k.dtype.itemsize)))
    splits = splits or max(1, min(pl.cdiv(PROGRAMS, rows * kv_heads), pl.cdiv(slots, block)))
    grouped = by_key_head(q, kv_heads)
    count = grouped.shape[2]
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, lines - count), (0, wide - dim)))
    table = jnp.stack(visits(lengths, queries, window, sinks, block), axis=-1)
    cache = pl.BlockSpec((None, slots, None, wide), lambda h, s, r: (r, 0, h, 0))
    parts = rows, kv_heads, splits, lines
    out, lse = pl.pallas_call(
        functools.partial(_kernel, dim=dim, block=block, queries=queries, limits=(window, sinks), soft_cap=soft_cap),
        out_shape=(
            shape_like(q, (*parts, wide), jnp.float32),
            shape_like(q, parts, jnp.float32),
        ),
        grid=(kv_heads, splits, rows),
        in_specs=(
            pl.BlockSpec((None, table.shape[1]), lambda h, s, r: (r, 0)),
            pl.BlockSpec((None, None, lines, wide), lambda h, s, r: (r, h, 0, 0)),
            cache,
            cache,
        ),
        out_specs=(
            pl.BlockSpec((None, None, None, lines, wide), lambda h, s, r: (r, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, lines), lambda h, s, r: (r, h, s, 0)),
        ),
        compiler_params=PARAMS,
        cost_estimate=cost(q, k, v, slots),
        interpret=interpret,
        name="attention_decode",
    )(table, grouped, k, v)
    return by_query(_together(out, lse)[:, :, :count, :dim], queries).astype(q.dtype)


def _kernel(table_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, dim, block, queries, limits, soft_cap):
    length, leading, first, count = (table_ref[i] for i in range(4))
    lines, wide = q_ref.shape
    share = lax.div(count + (pl.num_programs(1) - 1), pl.num_programs(1))
    begin = pl.program_id(1) * share
    ends = length - (queries - 1) + lax.rem(jnp.arange(lines, dtype=jnp.int32), np.int32(queries))
    q, scale = q_ref[...], dim**-0.5
    channels = jnp.arange(wide, dtype=jnp.int32) < dim

    def step(t, carry):
        out, top, total = carry
        at = block_of(t, leading, first) * block
        slots = at + jnp.arange(block, dtype=jnp.int32)
        there = (slots < length)[:, None] & channels[None, :]
        k, v = (plt.load(ref.at[pl.ds(at, block), :], mask=there, other=0.0) for ref in (k_ref, v_ref))
        scores = plt.dot(q, k, trans_b=True) * scale
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(sees(slots[None, :], ends[:, None], *limits), scores * LOG2E, -jnp.inf)
        new = jnp.maximum(top, scores.max(axis=1))
        base = jnp.where(new == -jnp.inf, 0.0, new)
        weights, kept = jnp.exp2(scores - base[:, None]), jnp.exp2(top - base)
        out = out * kept[:, None] + plt.dot(weights.astype(v.dtype), v)
        return out, new, total * kept + weights.sum(axis=1)

    none = jnp.full((lines,), -jnp.inf, jnp.float32), jnp.zeros((lines,), jnp.float32)
    end = jnp.minimum(begin + share, count)
    out, top, total = lax.fori_loop(begin, end, step, (jnp.zeros((lines, wide), jnp.float32), *none))
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out_ref[...] = out / divisor[:, None]
    lse_ref[...] = jnp.where(some, top + jnp.log2(divisor), -jnp.inf)


def _together(out: jax.Array, lse: jax.Array) -> jax.Array:
    """f32[rows, kv_heads, lines, dim] of parts f32[rows, kv_heads, parts, lines, dim]; lse in units of log 2."""
    top = lse.max(axis=2, keepdims=True)
    weights = jnp.exp2(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(axis=2)
    return (out * weights[..., None]).sum(axis=2) / jnp.where(total > 0, total, 1.0)[..., None]


def _side(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))
