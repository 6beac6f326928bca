"""Attention over selected positions."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import attention as reference_attention


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    return "reference in XLA, which has all of queries times keys in memory: there is no kernel yet"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_index: jax.Array | None,
    k_index: jax.Array | None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    k_valid: jax.Array | None = None,
    window: int = 0,
    causal: bool = True,
) -> jax.Array:
    """Attention in which a query sees the valid keys of its segment, those at its own or an earlier index if `causal`.

    q                       [batch, queries, heads, head_dim]
    k, v                    [batch, keys, kv_heads, head_dim]
    q_index, k_index        i32[batch, queries], i32[batch, keys]: positions in the row; both None when queries and keys
                            are the same ascending set of positions (a plain triangle)
    q_segments, k_segments  i32[batch, ...]: documents; None: one document per row
    k_valid                 bool[batch, keys]: keys that exist; None: all
    window                  how many indices a query sees, its own the last of them; 0: all (Mistral 7B, section 2). Of
                            attention that is not causal, as many on either side
    returns                 [batch, queries, heads, head_dim]
    """
    if q_index is None or k_index is None:
        mask = jnp.ones((1, q.shape[1], k.shape[1]), bool)
        if causal:
            mask = jnp.tril(mask)
        if window:
            mask = jnp.triu(mask, 1 - window)
            mask = mask if causal else jnp.tril(mask, window - 1)
    else:
        ahead = k_index[:, None, :] - q_index[:, :, None]
        mask = ahead <= 0 if causal else jnp.ones(ahead.shape, bool)
        if window:
            mask = mask & (ahead > -window)
            mask = mask if causal else mask & (ahead < window)
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :])
    if k_valid is not None:
        mask = mask & k_valid[:, None, :]
    return reference_attention(q, k, v, mask)
