"""Attention of the newest positions of each row over a cache of keys and values, as generation needs it.

On TPUs `decode_tpu`, on NVIDIA GPUs `decode_gpu`, elsewhere plain XLA. The kernels read what is seen of a cache, not
all that it could hold.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.attention import decode_gpu, decode_tpu
from kernels_pallas.attention.decode_visits import by_key_head, by_query, sees
from kernels_pallas.choice import by_platform


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    active: jax.Array | None = None,
    window: int = 0,
    sinks: int = 0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v of the last `queries` positions that a row's cache holds.

    q         [rows, queries, heads, head_dim]; few queries, usually one
    k, v      [rows, slots, kv_heads, head_dim] in q's dtype, finite; head h reads key head h // (heads / kv_heads)
    lengths   i32[rows], at most slots: keys that a row holds, in its first slots. The last query sees them all, the one
              before it all but the last, and so on
    active    bool[rows]; rows that take no part give 0, and kernels read nothing of them. None: all do
    window    keys that a query sees, the newest of its own; 0: all
    sinks     with a window: as many of the first keys are seen too
    soft_cap  scores become soft_cap * tanh(scores / soft_cap); 0: they stay
    returns   [rows, queries, heads, head_dim] in q's dtype; 0 of a query that sees nothing. The softmax is float32

    It has no gradient. On several TPUs or GPUs it must be called inside `jax.shard_map`, as every kernel. Raises
    ValueError for shapes, dtypes and options that do not fit.
    """
    _check(q, k, v, lengths, active)
    for name, value in (("window", window), ("sinks", sinks), ("soft_cap", soft_cap)):
        if value < 0:
            raise ValueError(f"{name} is {value}: must be at least 0")
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, k.shape[1])
    if active is not None:
        lengths = jnp.where(active, lengths, 0)
    return _decode(window, sinks, soft_cap, q, k, v, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode(window: int, sinks: int, soft_cap: float, *args: jax.Array) -> jax.Array:
    forms = decode_tpu.decode, decode_gpu.decode, everywhere
    tpu, cuda, default = (functools.partial(f, window=window, sinks=sinks, soft_cap=soft_cap) for f in forms)
    return by_platform(*args, tpu=tpu, cuda=cuda, default=default)


def _no_gradient(*_):
    raise NotImplementedError("decode is for generation and has no gradient: use attention")


_decode.defvjp(_no_gradient, _no_gradient)


def everywhere(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, window: int, sinks: int, soft_cap: float
) -> jax.Array:
    """As `decode`, with lengths of 0 for rows that take no part: over the whole cache, in XLA."""
    queries, kv_heads = q.shape[1], k.shape[2]
    grouped = by_key_head(q, kv_heads)
    scores = jnp.einsum("rhmd,rkhd->rhmk", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    turn = jnp.arange(grouped.shape[2], dtype=jnp.int32) % queries
    ends = (lengths[:, None] - (queries - 1) + turn)[:, None, :, None]
    mask = sees(jnp.arange(k.shape[1], dtype=jnp.int32), ends, window, sinks)
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0.0)
    out = jnp.einsum("rhmk,rkhd->rhmd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return by_query(out, queries).astype(q.dtype)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, active: jax.Array | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q is {q.shape}: must be [rows, queries, heads, head_dim]")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k is {k.shape}: must be [{q.shape[0]}, slots, kv_heads, {q.shape[3]}], as q {q.shape} is")
    if v.shape != k.shape:
        raise ValueError(f"v is {v.shape}: must be {k.shape}, as k is")
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(f"q is {q.shape}, k {k.shape}: must have at least one query and one slot")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads: must be a multiple of the {k.shape[2]} of k")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}: must be {q.dtype}, as q is")
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths is {lengths.dtype}{list(lengths.shape)}: must be i32[{q.shape[0]}], one of each row")
    if active is not None and (active.shape != q.shape[:1] or active.dtype != jnp.bool_):
        raise ValueError(f"active is {active.dtype}{list(active.shape)}: must be bool[{q.shape[0]}], one of each row")
