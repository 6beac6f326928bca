"""Masked softmax attention in plain jax.numpy: the specification that every implementation is tested against."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query with no visible key gets a harmless average instead of NaN


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim), where mask) v with grouped queries.

    q     [batch, queries, heads, head_dim]
    k, v  [batch, keys, kv_heads, head_dim]; query head h reads key head h // (heads / kv_heads)
    mask  bool[batch or 1, queries, keys]: which keys each query sees
    returns [batch, queries, heads, head_dim] in q's dtype; the softmax is float32
    """
    b, n_q, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # Queries of one group are rows of one matmul against their shared keys.
    q = (q * head_dim**-0.5).reshape(b, n_q, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgqs,bksd->bkgqd", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, n_q, heads, head_dim)
