"""Causal attention over selected positions."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import attention as reference_attention

IMPLEMENTATION = "reference (XLA)"


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_index: jax.Array | None,
    k_index: jax.Array | None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    k_valid: jax.Array | None = None,
) -> jax.Array:
    """Attention in which a query sees the valid keys of its segment at its own or an earlier index.

    q                       [batch, queries, heads, head_dim]
    k, v                    [batch, keys, kv_heads, head_dim]
    q_index, k_index        i32[batch, queries], i32[batch, keys]: positions in the row; both None when queries and keys
                            are the same ascending set of positions (a plain triangle)
    q_segments, k_segments  i32[batch, ...]: documents; None: one document per row
    k_valid                 bool[batch, keys]: keys that exist; None: all
    returns                 [batch, queries, heads, head_dim]
    """
    if q_index is None or k_index is None:
        mask = jnp.tril(jnp.ones((1, q.shape[1], k.shape[1]), bool))
    else:
        mask = k_index[:, None, :] <= q_index[:, :, None]
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :])
    if k_valid is not None:
        mask = mask & k_valid[:, None, :]
    return reference_attention(q, k, v, mask)
