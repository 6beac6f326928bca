"""Masked softmax attention in plain jax.numpy: the specification that every implementation is tested against."""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query with no visible key gets a harmless average instead of NaN


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float = 0.0) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim), where mask) v with grouped queries.

    q     [batch, queries, heads, head_dim]
    k, v  [batch, keys, kv_heads, head_dim]; query head h reads key head h // (heads / kv_heads)
    mask  bool[batch or 1, queries, keys]: which keys each query sees
    soft_cap  scores are soft_cap * tanh(scores / soft_cap); 0: as they are
    returns [batch, queries, heads, head_dim] in q's dtype; the softmax is float32
    """
    b, n_q, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # Queries of one group are rows of one matmul against their shared keys: with one axis of rows, not two, XLA's
    # matmuls on CPU are about twice as fast.
    q = (q * head_dim**-0.5).reshape(b, n_q, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b, kv_heads, group * n_q, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    out = jnp.einsum("bhqk,bhkd->bhqd", masked_softmax(scores, mask, v.dtype), v)
    return out.reshape(b, kv_heads, group, n_q, head_dim).transpose(0, 3, 1, 2, 4).reshape(b, n_q, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def masked_softmax(scores: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Softmax over keys where `mask`, computed in float32, returned as `dtype`.

    scores  f32[batch, kv_heads, group * queries, keys]
    mask    bool[batch or 1, queries, keys]

    The backward pass keeps the result alone, a third of what differentiating the formula would.
    """
    return jax.nn.softmax(_where(mask, scores, MASKED), axis=-1).astype(dtype)


def _forward(scores, mask, dtype):
    weights = masked_softmax(scores, mask, dtype)
    return weights, (weights, mask)


def _backward(dtype, residuals, d_weights):
    kept, mask = residuals
    weights, d_weights = kept.astype(jnp.float32), d_weights.astype(jnp.float32)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    return _where(mask, d_scores, 0.0), None


masked_softmax.defvjp(_forward, _backward)


def _where(mask: jax.Array, scores: jax.Array, otherwise: float) -> jax.Array:
    """`scores` where `mask`, which every head of every group shares."""
    b, kv_heads, _, n_k = scores.shape
    grouped = scores.reshape(b, kv_heads, -1, mask.shape[1], n_k)
    return jnp.where(mask[:, None, None], grouped, otherwise).reshape(scores.shape)
