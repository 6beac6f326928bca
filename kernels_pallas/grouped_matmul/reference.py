"""Grouped matmul in plain jax.numpy: the specification that every implementation is tested against."""

import jax
import jax.numpy as jnp


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row times the matrix of its group; every row is multiplied by every matrix and the others are masked out.

    rows         [R, K], sorted by group
    weights      [G, K, N]
    group_sizes  i32[G]
    returns      [R, N] in rows' dtype, 0 past the last group; the sum over K is float32
    """
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    row = jnp.arange(rows.shape[0])
    mask = (row >= (end - group_sizes)[:, None]) & (row < end[:, None])
    products = jnp.einsum("rk,gkn->grn", rows, weights, preferred_element_type=jnp.float32)
    return jnp.where(mask[..., None], products, 0).sum(0).astype(rows.dtype)
