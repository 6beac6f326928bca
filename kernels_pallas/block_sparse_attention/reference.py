"""Block-sparse attention by a dense mask in plain jax.numpy: the specification that every form is tested against."""

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention.table import to_map


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    counts: jax.Array,
    *,
    query_block: int,
    key_block: int,
    q_index: jax.Array | None = None,
    k_index: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    row_bits: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The result and the log-sum-exp of `kernels_pallas.block_sparse_attention.block_sparse_attention`."""
    n_q, n_k, heads = q.shape[1], k.shape[1], q.shape[2]
    mask = listed(table, counts, row_bits, query_block, key_block, n_q, n_k)
    q_index = jnp.arange(n_q)[None] if q_index is None else q_index
    k_index = jnp.arange(n_k)[None] if k_index is None else k_index
    ahead = (k_index[:, None, :] - q_index[:, :, None])[:, None]
    if causal:
        mask = mask & (ahead <= 0)
    if window:
        mask = mask & ((ahead > -window) | (k_index < sinks)[:, None, None, :])
        mask = mask if causal else mask & (ahead < window)
    if q_segments is not None and k_segments is not None:
        q_segments, k_segments = q_segments[:, None, :, None], k_segments[:, None, None, :]
        mask = mask & (q_segments == k_segments) & (k_segments > 0)
    mask = jnp.repeat(mask, heads // mask.shape[1], axis=1) if mask.shape[1] > 1 else mask
    return masked(q, k, v, mask, soft_cap)


def masked(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Result and log-sum-exp of attention under mask bool[batch or 1, heads or 1, queries, keys]."""
    heads = q.shape[2]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
    some = mask.any(-1)
    scores = jnp.where(mask, scores, jnp.where(some[..., None], -jnp.inf, 0.0))  # 0: no NaN where nothing is seen
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype), jnp.where(some, lse, -jnp.inf)


def listed(
    table: jax.Array,
    counts: jax.Array,
    row_bits: jax.Array | None,
    query_block: int,
    key_block: int,
    queries: int,
    keys: int,
) -> jax.Array:
    """bool[batch or 1, table heads, queries, keys]: the keys of listed blocks, of those that the query chose."""
    key_blocks, slots = -(-keys // key_block), table.shape[-1]
    if row_bits is None:
        by_query = jnp.repeat(to_map(table, counts, key_blocks), query_block, axis=2)
    else:
        slot = jnp.arange(slots)
        words = row_bits[..., slot // 32]  # of each query and slot
        chosen = (words >> (slot % 32).astype(jnp.uint32)) & 1 == 1
        chosen = chosen & (slot < counts[..., None])[..., None, :]
        here = chosen[..., None] & (table[..., None, :, None] == jnp.arange(key_blocks))
        by_query = here.any(-2)
        by_query = by_query.reshape(*by_query.shape[:2], -1, key_blocks)
    return jnp.repeat(by_query[:, :, :queries], key_block, axis=3)[..., :keys]
