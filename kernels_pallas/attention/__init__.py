"""Attention over selected positions, whose scores are never in memory all at once.

`reference` is the specification. On TPUs `splash`, on NVIDIA GPUs `cudnn` or `gpu`, elsewhere `blocked`; `Seen` is what
all of them are told. Short rows, and a few queries of generation, are computed by the reference.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.attention import blocked, cudnn, gpu, reference, splash
from kernels_pallas.attention.seen import Seen
from kernels_pallas.choice import Target, active_target, by_platform

SHORT = 256  # queries times keys that are written as they are where there is no kernel: the square of this
FEW = 16  # queries for which nothing but reading the keys costs time
KEPT = "attention"  # name, for policies of jax.checkpoint, of results that a backward pass would compute again


class Places(NamedTuple):
    """Where queries and keys stand, as arguments of `attention`."""

    q_index: jax.Array | None = None
    k_index: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    k_valid: jax.Array | None = None
    q_before: jax.Array | None = None
    q_first: jax.Array | None = None
    q_end: jax.Array | None = None


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    few = f"; up to {FEW} queries at once: reference in XLA"
    if platform == "tpu":
        return f"Pallas for TPUs (splash attention), which skips tiles that no query sees{few}"
    if platform == "gpu":
        return f"cuDNN where it takes the pattern, else Pallas through Triton{few}"
    return f"blocks of {blocked.BLOCK} in XLA: Pallas kernels are for TPUs and GPUs; rows up to {SHORT}: reference"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_index: jax.Array | None = None,
    k_index: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    k_valid: jax.Array | None = None,
    q_before: jax.Array | None = None,
    q_first: jax.Array | None = None,
    q_end: jax.Array | None = None,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attention in which a query sees the valid keys of its segment, those at its own or an earlier index if `causal`.

    q                       [batch, queries, heads, head_dim]
    k, v                    [batch, keys, kv_heads, head_dim]
    q_index, k_index        i32[batch, queries], i32[batch, keys]: positions in the row, ascending along it. Without
                            k_index key j stands at index j; without either, query j too
    q_segments, k_segments  i32[batch, ...], at least 0: documents; None: one document per row
    k_valid                 bool[batch, keys]: keys that exist; None: all
    q_before, q_first, q_end  i32[batch, queries], all or none: what each query sees, instead of `causal` and `window`:
                            keys at an index below q_before, and those from q_first to below q_end, which is not smaller
    window                  how many indices a query sees, its own the last of them; 0: all (Mistral 7B, section 2). Of
                            attention that is not causal, as many on either side
    sinks                   the first indices of the row, which a window leaves visible (StreamingLLM, section 3.2)
    soft_cap                scores are soft_cap * tanh(scores / soft_cap) (Gemma 2, section 2); 0: as they are
    returns                 [batch, queries, heads, head_dim] in q's dtype; the softmax is float32

    Of a query that sees nothing the result is finite and means nothing. Gradients reach q, k and v. On several TPUs or
    GPUs it must be called inside `jax.shard_map`, as every kernel. Raises ValueError for what does not fit.
    """
    places = Places(q_index, k_index, q_segments, k_segments, k_valid, q_before, q_first, q_end)
    _check(q, k, v, places, window, sinks, soft_cap)
    plain = all(x is None for x in (q_index, q_segments, k_valid, q_end)) and not (sinks and window) and not soft_cap
    seen = seen_of(q.shape[:2], k.shape[:2], places, window=window, sinks=sinks, causal=causal)
    platform, wanted, _ = active_target() or Target("")
    kernels = platform in ("gpu", "tpu") and wanted == "auto"
    short = q.shape[1] * k.shape[1] <= SHORT**2 and not kernels
    if short or q.shape[1] <= FEW or wanted == "reference":
        return reference.attention(q, k, v, seen.mask(k.shape[1]), soft_cap)
    if platform == "gpu" and plain and cudnn.takes(q, k, v):
        return cudnn.attention(q, k, v, window=window, causal=causal)
    return over_seen(soft_cap, q, k, v, seen)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, soft_cap: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys that are `seen`, without a gradient, and f32[batch, heads, queries]: the log of the sum
    of the exponentials of a query's scores, so that results over disjoint keys can be merged.

    Of a query that sees nothing the sum is -inf or below -1e30, and the result finite.
    """
    tpu, cuda, default = (functools.partial(form.forward, soft_cap=soft_cap) for form in _forms(q, k))
    return by_platform(q, k, v, seen, tpu=tpu, cuda=cuda, default=default)


def pulled(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    delta: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys contribute to the cotangents of q, k and v, in their dtypes, for `attend` over these and others.

    delta, lse  f32[batch, heads, queries]: `delta_of` the whole result, and its log-sum-exp
    """
    tpu, cuda, default = (functools.partial(form.backward, soft_cap=soft_cap) for form in _forms(q, k))
    return by_platform(q, k, v, seen, delta, lse, d_out, tpu=tpu, cuda=cuda, default=default)


def delta_of(out: jax.Array, d_out: jax.Array) -> jax.Array:
    """f32[batch, heads, queries]: the products of the result's rows [batch, queries, heads, head_dim] and their
    cotangents."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return (out.astype(wide) * d_out.astype(wide)).sum(-1).swapaxes(1, 2)


def kept_by_name(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A result and its log-sum-exp, named KEPT for policies of jax.checkpoint."""
    # As one matrix: TPUs lay the last dimension out in 128 lanes, of which a head fills half.
    flat = checkpoint_name(out.reshape(*out.shape[:2], -1), KEPT)
    return flat.reshape(out.shape), checkpoint_name(lse, KEPT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_seen(soft_cap: float, q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
    """The result of `attend`, with gradients of q, k and v."""
    return _forward(soft_cap, q, k, v, seen)[0]


def _forward(soft_cap, q, k, v, seen):
    out, lse = kept_by_name(*attend(q, k, v, seen, soft_cap))
    return out, (q, k, v, seen, out, lse)


def _backward(soft_cap, kept, d_out):
    q, k, v, seen, out, lse = kept
    return *pulled(q, k, v, seen, delta_of(out, d_out), lse, d_out, soft_cap), None


over_seen.defvjp(_forward, _backward)


def _forms(q: jax.Array, k: jax.Array) -> tuple[ModuleType, ModuleType, ModuleType]:
    """What computes it on TPUs, on NVIDIA GPUs and elsewhere."""
    kernels = jnp.promote_types(q.dtype, jnp.float32) == jnp.float32
    return splash if kernels else blocked, gpu if kernels else blocked, blocked


def seen_of(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    places: Places,
    *,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
) -> Seen:
    """The interval of key slots that each query sees, and tags for documents and keys that exist; the arguments of
    `attention`, of [batch, queries] and [batch, keys]."""
    q_index, k_index, q_segments, k_segments, k_valid, q_before, q_first, q_end = places
    count = keys[1]
    index = jnp.arange(queries[1], dtype=jnp.int32)[None] if q_index is None else q_index
    up = None if k_index is None else jax.lax.cummax(k_index, axis=1)

    def before(index: jax.Array) -> jax.Array:
        """How many keys stand before the index."""
        if up is None:
            return jnp.clip(index, 0, count)
        index = jnp.broadcast_to(index, (up.shape[0], index.shape[1]))
        return jax.vmap(jnp.searchsorted)(up, index).astype(jnp.int32)

    if q_before is not None and q_first is not None and q_end is not None:
        seen = Seen(before(q_first), before(q_end), before(q_before))
    else:
        everything = jnp.full_like(index, count)
        reach = before(index + window) if window else everything
        end = before(index + 1) if causal else reach
        seen = Seen(before(index - window + 1) if window else jnp.zeros_like(index), end)
        if window and sinks:
            seen = seen._replace(sinks=jnp.minimum(before(jnp.full_like(index, sinks)), end))
    if q_segments is None and k_valid is None:
        return seen
    q_tags = jnp.zeros(queries, jnp.int32) if q_segments is None else q_segments
    k_tags = jnp.zeros(keys, jnp.int32) if k_segments is None else k_segments
    return seen._replace(q_tags=q_tags, k_tags=k_tags if k_valid is None else jnp.where(k_valid, k_tags, -1))


def _check(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, window: int, sinks: int, soft_cap: float) -> None:
    if q.ndim != 4 or not q.size:
        raise ValueError(f"q is {q.shape}: must be [batch, queries, heads, head_dim], none of them 0")
    batch, queries, heads, head_dim = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != head_dim or not k.size or heads % k.shape[2]:
        raise ValueError(
            f"k is {k.shape}: must be [{batch}, keys, kv_heads, {head_dim}], kv_heads a divisor of {heads}"
        )
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v is {v.shape}: must be {(*k.shape[:3], 'head_dim')}, as k is {k.shape}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be of one floating type")
    of = {"q": (batch, queries), "k": (batch, k.shape[1])}
    for name, value in places._asdict().items():
        shape, kind = of[name[0]], jnp.bool_ if name == "k_valid" else jnp.integer
        if value is not None and (value.shape not in (shape, (1, shape[1])) or not jnp.issubdtype(value.dtype, kind)):
            raise ValueError(f"{name} is {value.dtype}{list(value.shape)}: must be {kind.__name__} {list(shape)}")
    q_index, k_index, q_segments, k_segments, _, *told = places
    if any(x is None for x in told) != all(x is None for x in told):
        raise ValueError("q_before, q_first and q_end: all must be given, or none")
    if told[0] is not None and (window or sinks):
        raise ValueError(f"window={window}, sinks={sinks} beside q_end, which says what is seen: must be 0")
    if q_index is None and (k_index is not None or queries != k.shape[1]):
        raise ValueError(f"q_index is None: with k_index, or {queries} queries and {k.shape[1]} keys, it must be given")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments and k_segments: both must be given, or neither")
    for name, number in (("window", window), ("sinks", sinks), ("soft_cap", soft_cap)):
        if number < 0:
            raise ValueError(f"{name} is {number}: must be at least 0")
