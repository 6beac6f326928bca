"""Grouped matmul on NVIDIA GPUs: Pallas kernels on Triton.

Rows stay where they are. Each program computes one tile of the result; a table made from the group sizes says which
group a tile of rows belongs to and where its rows begin and end (MegaBlocks, Gale et al. 2022, section 5, without the
padding of groups to whole tiles: loads and stores are masked instead).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.grouped_matmul.costs import cost
from kernels_pallas.grouped_matmul.varying import shape_like
from kernels_pallas.sizes import sizes

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile; DEPTH is what one step of the inner loop sums over, in 2-byte numbers
PARAMS = plt.CompilerParams(num_warps=8, num_stages=3)


def forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[R, N]: `reference.grouped_matmul`."""
    return _multiply(rows, weights, group_sizes, transposed=False, interpret=interpret)


def backward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, d_out: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of rows and weights for the cotangent [R, N] of the result."""
    d_rows = _multiply(d_out, weights, group_sizes, transposed=True, interpret=interpret)
    return d_rows, _outer(rows, d_out, weights, group_sizes, interpret)


def _multiply(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transposed: bool, interpret: bool
) -> jax.Array:
    """Each row [K] times its group's matrix [K, N], or with `transposed` times the transpose of its matrix [N, K]."""
    (total, k), n = rows.shape, weights.shape[1 if transposed else 2]
    most_r, most_n, depth = _sizes(rows.dtype)
    block_r, block_n, block_k = _tile(total, most_r), _tile(n, most_n), _tile(k, depth)
    tiles = _tiles(group_sizes, total, block_r)
    kernel = functools.partial(_multiply_kernel, blocks=(block_r, block_n, block_k), transposed=transposed)
    return pl.pallas_call(
        kernel,
        out_shape=shape_like(rows, (total, n)),
        grid=(pl.cdiv(n, block_n), tiles[0].size),  # neighbouring programs share their rows
        compiler_params=PARAMS,
        cost_estimate=cost(rows, weights, jax.ShapeDtypeStruct((total, n), rows.dtype)),
        interpret=interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*tiles, rows, weights)


def _multiply_kernel(group_ref, first_ref, end_ref, rows_ref, weights_ref, out_ref, *, blocks, transposed):
    block_r, block_n, block_k = blocks
    k, (groups, n) = rows_ref.shape[1], (weights_ref.shape[0], out_ref.shape[1])
    tile, column = pl.program_id(1), pl.program_id(0) * block_n
    group, first, end = group_ref[tile], first_ref[tile], end_ref[tile]
    row_mask, column_mask = _within(first, block_r, end), _within(column, block_n, n)
    some = jnp.minimum(group, groups - 1)  # the tiles of rows past the last group name a group that is none

    def step(i, total):
        at = i * block_k
        k_mask = _within(at, block_k, k)
        a = _load(rows_ref.at[pl.ds(first, block_r), pl.ds(at, block_k)], row_mask, k_mask)
        if transposed:
            b = _load(weights_ref.at[some, pl.ds(column, block_n), pl.ds(at, block_k)], column_mask, k_mask)
        else:
            b = _load(weights_ref.at[some, pl.ds(at, block_k), pl.ds(column, block_n)], k_mask, column_mask)
        return total + plt.dot(a, b, trans_b=transposed)

    steps = ((group < groups) & (first < end)).astype(jnp.int32) * pl.cdiv(k, block_k)
    total = lax.fori_loop(0, steps, step, jnp.zeros((block_r, block_n), jnp.float32))
    out = out_ref.at[pl.ds(first, block_r), pl.ds(column, block_n)]
    plt.store(out, total.astype(out_ref.dtype), mask=row_mask[:, None] & column_mask[None, :])


def _outer(rows: jax.Array, d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array, interpret: bool) -> jax.Array:
    """[G, K, N]: of each group, its rows [., K] transposed times its cotangents [., N]."""
    groups, k, n = weights.shape
    most_k, most_n, depth = _sizes(rows.dtype)
    block_r, block_n, block_k = _tile(rows.shape[0], depth), _tile(n, most_n), _tile(k, most_k)
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return pl.pallas_call(
        functools.partial(_outer_kernel, blocks=(block_r, block_n, block_k)),
        out_shape=shape_like(weights),
        grid=(pl.cdiv(n, block_n), pl.cdiv(k, block_k), groups),
        compiler_params=PARAMS,
        cost_estimate=cost(rows, weights, d_out),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(end - group_sizes, end, rows, d_out)


def _outer_kernel(first_ref, end_ref, rows_ref, d_ref, out_ref, *, blocks):
    block_r, block_n, block_k = blocks
    _, k, n = out_ref.shape
    column, depth, group = pl.program_id(0) * block_n, pl.program_id(1) * block_k, pl.program_id(2)
    first, end = first_ref[group], end_ref[group]
    k_mask, column_mask = _within(depth, block_k, k), _within(column, block_n, n)

    def step(i, total):
        at = first + i * block_r
        row_mask = _within(at, block_r, end)
        a = _load(rows_ref.at[pl.ds(at, block_r), pl.ds(depth, block_k)], row_mask, k_mask)
        b = _load(d_ref.at[pl.ds(at, block_r), pl.ds(column, block_n)], row_mask, column_mask)
        return total + plt.dot(a, b, trans_a=True)

    steps = lax.div(end - first + (block_r - 1), np.int32(block_r))
    total = lax.fori_loop(0, steps, step, jnp.zeros((block_k, block_n), jnp.float32))
    out = out_ref.at[group, pl.ds(depth, block_k), pl.ds(column, block_n)]
    plt.store(out, total.astype(out_ref.dtype), mask=k_mask[:, None] & column_mask[None, :])


def _tiles(group_sizes: jax.Array, total: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """i32[tiles] each: the group of every tile of rows, its first row, and the row after the last of that group.

    Rows past the last group form one more, so that they are written too. The number of tiles is what any group sizes
    need at most; a tile too many begins at `total` and has no rows.
    """
    sizes = jnp.append(group_sizes, total - group_sizes.sum()).astype(jnp.int32)
    count = lax.div(sizes + (block - 1), np.int32(block))
    last, end = jnp.cumsum(count, dtype=jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)
    tile = jnp.arange(total // block + sizes.size, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, tile, side="right", method="compare_all"), sizes.size - 1)
    first = (end - sizes)[group] + (tile - (last - count)[group]) * block
    return group.astype(jnp.int32), jnp.minimum(first, total), end[group]


def _load(ref: Any, row_mask: jax.Array, column_mask: jax.Array) -> jax.Array:
    return plt.load(ref, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


def _within(start: jax.Array, size: int, end: jax.Array | int) -> jax.Array:
    return start + jnp.arange(size, dtype=jnp.int32) < end


def _tile(size: int, most: int) -> int:
    """The side of a tile along an axis of `size`: a power of two, at least 16, the least that Triton's dot takes."""
    return min(most, max(16, pl.next_power_of_2(size)))


def _sizes(dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
    """(rows, columns, depth) of a tile at most, the depth of numbers of this type."""
    rows, columns, depth = sizes("grouped_matmul/gpu", (ROWS, COLUMNS, DEPTH))
    return rows, columns, depth * 2 // jnp.dtype(dtype).itemsize
