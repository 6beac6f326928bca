"""Grouped matmul on TPUs: XLA's own kernel behind `lax.ragged_dot`, and one of ours for the weights' gradient.

XLA has a kernel for rows times matrices, plain or transposed, but computes the gradient of the weights as a dense
product of all rows for every group.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul.costs import cost
from kernels_pallas.grouped_matmul.varying import shape_like

ROWS, SIDE = 256, 512  # of a tile: its rows, and the sides of the tile of a matrix that it adds to


def forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[R, N]: `reference.grouped_matmul`."""
    return _within_groups(_multiply(rows, weights, group_sizes), group_sizes)


@jax.custom_batching.sequential_vmap  # jax batches it along the first axis alone
def _multiply(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=rows.dtype)


def backward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of rows and weights for the cotangent [R, N] of the result."""
    return transposed(d_out, weights, group_sizes), outer(rows, d_out, weights, group_sizes)


def transposed(d_out: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row [N] times the transpose of its group's matrix [K, N]. XLA's kernel has the transposed matrices written
    out, also where `lax.ragged_dot_general` is told to sum over their last axis."""
    return forward(d_out, weights.transpose(0, 2, 1), group_sizes)


def _within_groups(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x, 0 past the last group: what a kernel leaves in rows that it does not visit is its own affair."""
    return jnp.where((jnp.arange(x.shape[0], dtype=jnp.int32) < group_sizes.sum())[:, None], x, 0)


def outer(
    rows: jax.Array,
    d_out: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """[G, K, N] in weights' shape: of each group, its rows [., K] transposed times its cotangents [., N]."""
    _, k, n = weights.shape
    block_r, block_k, block_n = min(ROWS, rows.shape[0]), min(SIDE, k), min(SIDE, n)
    visits = _visits(group_sizes, rows.shape[0], block_r)
    tile = lambda size, axis: pl.BlockSpec((block_r, size), lambda *at: (at[4][at[2]], at[axis]))  # noqa: E731
    return pl.pallas_call(
        functools.partial(_outer_kernel, block_r=block_r),
        out_shape=shape_like(weights),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, block_n), pl.cdiv(k, block_k), visits[0].size),
            in_specs=[tile(block_k, 1), tile(block_n, 0)],
            out_specs=pl.BlockSpec((None, block_k, block_n), lambda *at: (at[3][at[2]], at[1], at[0])),
            scratch_shapes=[pltpu.VMEM((block_k, block_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(rows, weights, d_out),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(*visits, rows, d_out)


def _outer_kernel(group_ref, tile_ref, first_ref, end_ref, rows_ref, d_ref, out_ref, total_ref, *, block_r):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group, first, end = group_ref[visit], first_ref[visit], end_ref[visit]

    @pl.when((visit == 0) | (group_ref[jnp.maximum(visit - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(first < end)
    def _():
        row = tile_ref[visit] * block_r + lax.broadcasted_iota(jnp.int32, (block_r, 1), 0)
        mask = (row >= first) & (row < end)
        # Both are masked: the last tile reaches past the last row, where anything may be. The vector unit of older
        # chips selects in float32 alone.
        a, d = (jnp.where(mask, ref[...].astype(jnp.float32), 0).astype(ref.dtype) for ref in (rows_ref, d_ref))
        total_ref[...] += lax.dot_general(a, d, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when((visit == last) | (group_ref[jnp.minimum(visit + 1, last)] != group))
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _visits(group_sizes: jax.Array, total: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """i32[visits] each: a group, a tile of rows that holds some of its rows, and the group's first row and end.

    Visits go through the groups in order, since a tile of the result stays in memory only while it is the same. A group
    without rows is visited once, to be written as 0. Visits left over are to the last group, with no rows.
    """
    sizes = group_sizes.astype(jnp.int32)
    end = jnp.cumsum(sizes, dtype=jnp.int32)
    first = end - sizes
    low = first // block
    count = jnp.where(sizes > 0, lax.div(end + (block - 1), np.int32(block)) - low, 1)
    after = jnp.cumsum(count, dtype=jnp.int32)
    visit = jnp.arange(pl.cdiv(total, block) + sizes.size, dtype=jnp.int32)
    group = jnp.searchsorted(after, visit, side="right", method="compare_all").astype(jnp.int32)
    over = group == sizes.size
    group = jnp.minimum(group, sizes.size - 1)
    tile = jnp.minimum(low[group] + visit - (after - count)[group], pl.cdiv(total, block) - 1)
    return group, tile, jnp.where(over, 0, first[group]), jnp.where(over, 0, end[group])
