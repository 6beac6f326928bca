"""Grouped matmul: rows sorted by group, each times its group's matrix."""

import jax

from kernels_pallas.grouped_matmul import blocks


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row times the matrix of its group.

    rows         [R, K], sorted by group: the first group_sizes[0] rows belong to group 0, and so on
    weights      [G, K, N]
    group_sizes  i32[G], at least 0, with a sum of at most R; groups may be empty
    returns      [R, N] in rows' dtype; sums are float32; rows past the last group give 0 and get no gradient

    For the backward pass rows and weights are kept, nothing else.
    """
    return _grouped_matmul(rows, weights, group_sizes)


@jax.custom_vjp
def _grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return blocks.forward(rows, weights, group_sizes)


def _forward(rows, weights, group_sizes):
    return _grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    return *blocks.backward(rows, weights, group_sizes, d_out.astype(rows.dtype)), None


_grouped_matmul.defvjp(_forward, _backward)
