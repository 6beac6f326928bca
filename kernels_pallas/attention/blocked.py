"""Attention by blocks of queries and keys in plain jax.numpy: memory linear in the row, for any platform.

FlashAttention (Dao et al. 2022) as loops: the softmax of a block of queries is corrected as blocks of keys arrive, and
blocks that no query of a block sees are not visited. The backward pass computes the weights of each block again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.seen import Seen
from kernels_pallas.attention.tiles import of_all_rows
from kernels_pallas.sizes import sizes

BLOCK = 256  # queries and keys of a block, at most
MASKED = -1e30


class _Rows(NamedTuple):
    """A block of queries: first, end, sinks and tags are i32[batch or 1, block]."""

    q: jax.Array  # [batch, kv_heads, group * block, head_dim], scaled
    seen: Seen


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, *, soft_cap: float = 0.0, block: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The result [batch, queries, heads, head_dim], and f32[batch, heads, queries]: log of the sum of exponentials.

    q [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]
    block  queries and keys of one, at most; 0: as suits the device
    Of a query that sees nothing: 0 and -inf.
    """
    block = block or sizes("attention/xla", (BLOCK,))[0]
    size_q, size_k = min(block, q.shape[1]), min(block, k.shape[1])
    keys, values = _key_blocks(k, size_k), _key_blocks(v, size_k)
    rows = _query_blocks(q, seen, size_q, k.shape[2])
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one(at: tuple[_Rows, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, order, count = at

        def body(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            j = order[t]
            scores = _scores(rows, keys[j], j, seen.k_tags, size_k, soft_cap)[0]
            new = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new[..., None])
            kept = jnp.exp(top - new)
            out = out * kept[..., None] + _dot("bhqk,bhkd->bhqd", weights.astype(v.dtype), values[j], wide)
            return new, total * kept + weights.sum(-1), out

        shape = rows.q.shape[:3]
        start = (
            jnp.full(shape, MASKED / 2, wide),
            jnp.zeros(shape, wide),
            jnp.zeros((*shape, v.shape[-1]), wide),
        )
        top, total, out = lax.fori_loop(0, count, body, start)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return (out / total[..., None]).astype(q.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)

    out, lse = lax.map(one, (rows, *_visits(seen, k.shape[1], size_q, size_k)))
    return _joined(out, q.shape), _joined(lse[..., None], (*q.shape[:3], 1))[..., 0].swapaxes(1, 2)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    delta: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    soft_cap: float = 0.0,
    block: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v for that of the result, `d_out`; see `forward`, which also gave `lse`.

    delta  f32[batch, heads, queries]: sums over a row of the result times `d_out`
    """
    block = block or sizes("attention/xla", (BLOCK,))[0]
    size_q, size_k = min(block, q.shape[1]), min(block, k.shape[1])
    kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    keys, values = _key_blocks(k, size_k), _key_blocks(v, size_k)
    rows = _query_blocks(q, seen, size_q, kv_heads)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    delta, per_query = (x.swapaxes(1, 2)[..., None] for x in (delta, lse))
    cut = functools.partial(_cut, size=size_q, kv_heads=kv_heads)

    def one(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        rows, d_out, lse, delta, order, count = at
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

        def body(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            j = order[t]
            scores, slope = _scores(rows, keys[j], j, seen.k_tags, size_k, soft_cap)
            weights = jnp.exp(scores - lse)
            d_weights = _dot("bhqd,bhkd->bhqk", d_out, values[j], wide)
            d_scores = weights * (d_weights - delta)
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)
            d_v = d_v.at[j].add(_dot("bhqk,bhqd->bhkd", weights.astype(q.dtype), d_out, wide))
            d_k = d_k.at[j].add(_dot("bhqk,bhqd->bhkd", d_scores, rows.q, wide))
            return d_q + _dot("bhqk,bhkd->bhqd", d_scores, keys[j], wide), d_k, d_v

        d_q, *carry = lax.fori_loop(0, count, body, (jnp.zeros(rows.q.shape, wide), *carry))
        return (carry[0], carry[1]), (d_q * scale).astype(q.dtype)

    zeros = jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide)
    visits = _visits(seen, k.shape[1], size_q, size_k)
    (d_k, d_v), d_q = lax.scan(one, zeros, (rows, cut(d_out), cut(per_query), cut(delta), *visits))
    return _joined(d_q, q.shape), _keys_joined(d_k, k), _keys_joined(d_v, v)


def _dot(form: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=dtype)


def _scores(
    rows: _Rows, keys: jax.Array, j: jax.Array, k_tags: jax.Array | None, size: int, soft_cap: float
) -> tuple[jax.Array, jax.Array | None]:
    """[batch, kv_heads, group * queries, keys] of one block, far below 0 where a key is not seen, and their slope."""
    scores = _dot("bhqd,bhkd->bhqk", rows.q, keys, jnp.promote_types(rows.q.dtype, jnp.float32))
    slope = None
    if soft_cap:
        scores = jnp.tanh(scores / soft_cap)
        slope = 1 - jnp.square(scores)
        scores = soft_cap * scores
    tags = None if k_tags is None else lax.dynamic_slice_in_dim(_padded(k_tags, size, -1), j * size, size, axis=1)
    mask = rows.seen._replace(k_tags=tags).mask(size, j * size)
    grouped = scores.reshape(*scores.shape[:2], -1, mask.shape[1], size)
    return jnp.where(mask[:, None, None], grouped, MASKED).reshape(scores.shape), slope


def _visits(seen: Seen, keys: int, size_q: int, size_k: int) -> tuple[jax.Array, jax.Array]:
    """For each block of queries: the blocks of keys in order, those to visit first, and how many these are."""
    tiles = of_all_rows(seen, seen.first.shape[1], keys, size_q, size_k)
    return jnp.argsort(~tiles, axis=1, stable=True), tiles.sum(1)


def _query_blocks(q: jax.Array, seen: Seen, size: int, kv_heads: int) -> _Rows:
    """Blocks of queries along a new first axis; padding sees nothing."""

    def cut(x: jax.Array | None, filler: int) -> jax.Array | None:
        if x is None:
            return None
        return _padded(x, size, filler).reshape(x.shape[0], -1, size).swapaxes(0, 1)

    scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    rows = Seen(cut(seen.first, 0), cut(seen.end, 0), cut(seen.sinks, 0), cut(seen.q_tags, 0))  # type: ignore[arg-type]
    return _Rows(_cut(scaled, size, kv_heads), rows)


def _cut(x: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """[batch, queries, heads, d] -> [blocks, batch, kv_heads, group * size, d]."""
    x = _padded(x, size, 0)
    b, n, heads, d = x.shape
    x = x.reshape(b, n // size, size, kv_heads, heads // kv_heads, d)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(n // size, b, kv_heads, -1, d)


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `_cut` was made of, of this shape."""
    b, n, heads, d = shape
    count, _, kv_heads, _, _ = blocks.shape
    x = blocks.reshape(count, b, kv_heads, heads // kv_heads, -1, d)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, heads, d)[:, :n]


def _key_blocks(x: jax.Array, size: int) -> jax.Array:
    """[batch, keys, kv_heads, d] -> [blocks, batch, kv_heads, size, d]."""
    x = _padded(x, size, 0)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _keys_joined(blocks: jax.Array, like: jax.Array) -> jax.Array:
    x = blocks.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]].astype(like.dtype)


def _padded(x: jax.Array, size: int, filler: int) -> jax.Array:
    """[batch, n, ...] with n a multiple of `size`."""
    short = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)), constant_values=filler) if short else x
