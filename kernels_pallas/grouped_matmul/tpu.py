"""Grouped matmul on TPUs: XLA's own kernels behind `lax.ragged_dot`, forward and backward."""

import jax
import jax.numpy as jnp
from jax import lax


def forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[R, N]: `reference.grouped_matmul`."""
    out = lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=rows.dtype)
    return _within_groups(out, group_sizes)


def backward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of rows and weights for the cotangent [R, N] of the result."""
    _, pull = jax.vjp(lambda r, w: lax.ragged_dot(r, w, group_sizes, preferred_element_type=r.dtype), rows, weights)
    d_rows, d_weights = pull(d_out)
    return _within_groups(d_rows, group_sizes), jnp.where((group_sizes > 0)[:, None, None], d_weights, 0)


def _within_groups(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x, 0 past the last group: what a kernel leaves in rows that it does not visit is its own affair."""
    return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], x, 0)
