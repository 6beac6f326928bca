"""Attention on TPUs by the kernel that comes with JAX (`jax.experimental.pallas.ops.tpu.splash_attention`).

Its mask is a function of one number of the query and the key's slot. That number may be computed while the program
runs, as may the table of tiles to visit, so an interval of slots packed into it serves every pattern of `Seen`. All
that is taken from the library's private side is in this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernels_pallas.attention.seen import Seen
from kernels_pallas.attention.tiles import of_all_rows
from kernels_pallas.sizes import Sizes, sizes

LANES = 128
BLOCK = 512, 512  # queries and keys of a tile where rows have as many
MOST_KEYS = 2**15 - LANES  # of one call: an interval of slots takes 32 bits with its sign
FUSED = 4  # blocks of keys up to which the backward pass keeps a gradient of the queries for each and adds them up
MASKED = splash.DEFAULT_MASK_VALUE


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, *, soft_cap: float = 0.0, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `blocked.forward`; a query that sees nothing gets the mean of some values, and a sum of about exp(-1e38)."""
    found = [_forward(q, k[:, at], v[:, at], part, soft_cap, interpret) for at, part in _parts(seen, k.shape[1])]
    out, lse = functools.reduce(_merged, found)
    return out.astype(q.dtype), lse


def _merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Results over keys that they do not share, and their log-sum-exps, as one."""
    lse = jnp.logaddexp(a[1], b[1])
    share = [jnp.exp(part - lse).swapaxes(1, 2)[..., None] for part in (a[1], b[1])]
    return a[0] * share[0] + b[0] * share[1], lse


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `blocked.backward`."""
    d_q, d_keys = jnp.zeros(q.shape, jnp.float32), dict[int, list[Any]]()
    for at, part in _parts(seen, k.shape[1]):
        more, *d_kv = _backward(q, k[:, at], v[:, at], part, delta, lse, d_out, soft_cap, interpret)
        d_q = d_q + more.astype(jnp.float32)
        d_keys[at.start] = [a + b for a, b in zip(d_keys.get(at.start, (0, 0)), d_kv, strict=True)]
    d_k, d_v = (jnp.concatenate(pieces, axis=1) for pieces in zip(*d_keys.values(), strict=True))
    return d_q.astype(q.dtype), d_k, d_v


def _parts(seen: Seen, keys: int) -> list[tuple[slice, Seen]]:
    """As many keys as a call takes, and intervals of what is seen of them: with sinks two, which share no key."""
    intervals = [seen]
    if seen.sinks is not None:
        sinks = jnp.minimum(seen.sinks, seen.end)
        near = seen._replace(first=jnp.maximum(seen.first, sinks), sinks=None)
        intervals = [near, near._replace(first=jnp.zeros_like(sinks), end=sinks)]
    found = []
    count = -(-keys // MOST_KEYS)
    size = -(-keys // (count * LANES)) * LANES
    for start in range(0, keys, size):
        at = slice(start, min(start + size, keys))
        slot = lambda x, at=at: jnp.clip(x - at.start, 0, at.stop - at.start)  # noqa: E731
        tags = None if seen.k_tags is None else seen.k_tags[:, at]
        found += [(at, x._replace(first=slot(x.first), end=slot(x.end), k_tags=tags)) for x in intervals]
    return found


def _forward(q, k, v, seen, soft_cap, interpret):
    size_q, size_k, q_, k_, v_, seen = _prepared(q, k, v, seen, sizes("attention/tpu/forward", BLOCK))

    def row(q, k, v, numbers, tags):
        info = _tables(seen, size_q, size_k, k.shape[1], numbers)
        return splash._splash_attention_forward(
            info,
            q,
            k,
            v,
            tags,
            None,
            mask_value=MASKED,
            is_mqa=False,
            block_sizes=_sizes(size_q, size_k, k.shape[1]),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_within,
            attn_logits_soft_cap=soft_cap or None,
            interpret=interpret,
        )

    out, (lse,) = _over_rows(row, seen, q_, k_, v_)
    return out.swapaxes(1, 2)[:, : q.shape[1], :, : v.shape[-1]], lse[..., : q.shape[1]]


def _backward(q, k, v, seen, delta, lse, d_out, soft_cap, interpret):
    size_q, size_k, q_, k_, v_, seen = _prepared(q, k, v, seen, sizes("attention/tpu/backward", BLOCK))
    d_out = _heads_first(d_out, size_q)
    lse, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, q_.shape[2] - x.shape[2]))) for x in (lse, delta))
    blocks = _sizes(size_q, size_k, k_.shape[2])
    layouts = {"q_layout": blocks.q_layout, "k_layout": blocks.k_layout, "v_layout": blocks.v_layout}
    how: dict[str, Any] = layouts | {
        "is_mqa": False,
        "mask_value": MASKED,
        "attn_logits_soft_cap": soft_cap or None,
        "mask_function": _within,
        "interpret": interpret,
    }

    def row(q, k, v, lse, d_out, delta, numbers, tags):
        given = (q, k, v, tags, None, lse, d_out, delta)
        d_q, d_k, d_v = splash._splash_attention_bwd_dkv(
            *given,
            bq=size_q,
            bkv=size_k,
            bkv_compute=size_k,
            mask_info=_tables(seen, size_q, size_k, k.shape[1], numbers, by_key=True),
            use_fused_bwd_kernel=blocks.use_fused_bwd_kernel,
            **how,
        )
        if not blocks.use_fused_bwd_kernel:
            info = _tables(seen, size_q, size_k, k.shape[1], numbers)
            d_q = splash._splash_attention_bwd_dq(*given, bq=size_q, bkv=size_k, mask_info=info, **how)
        return d_q, d_k, d_v

    d_q, d_k, d_v = _over_rows(row, seen, q_, k_, v_, lse, d_out, delta)
    scale = q.shape[-1] ** -0.5
    d_q, d_k, d_v = (d.swapaxes(1, 2) for d in (d_q, d_k, d_v))
    d_q = (d_q[:, : q.shape[1], :, : q.shape[-1]] * scale).astype(q.dtype)
    return d_q, d_k[:, : k.shape[1], :, : k.shape[-1]], d_v[:, : v.shape[1], :, : v.shape[-1]]


def _over_rows(row: Callable[..., Any], seen: Seen, *arrays: jax.Array) -> Any:
    """`row` of every row of the batch. Tables of tiles may not differ between rows: they are of all together."""
    numbers = seen.first << 16 | seen.end
    shared = numbers.shape[0] == 1
    tags = None if seen.q_tags is None or seen.k_tags is None else splash.SegmentIds(seen.q_tags, seen.k_tags)
    axes = (*(0,) * len(arrays), None if shared else 0, None if tags is None else 0)
    return jax.vmap(row, in_axes=axes)(*arrays, numbers[0] if shared else numbers, tags)


def _prepared(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, most: Sizes
) -> tuple[int, int, jax.Array, jax.Array, jax.Array, Seen]:
    """(queries of a tile, keys of a tile, q scaled, k, v, seen) with heads first, in whole tiles."""
    lengths = q.shape[1], k.shape[1]
    size_q, size_k = (min(size, -(-n // LANES) * LANES) for size, n in zip(most, lengths, strict=True))
    scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    pad_q, pad_k = -q.shape[1] % size_q, -k.shape[1] % size_k

    def padded(x: jax.Array | None, by: int, filler: int) -> jax.Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, by)), constant_values=filler)

    seen = Seen(
        padded(seen.first, pad_q, 0),  # type: ignore[arg-type]
        padded(seen.end, pad_q, 0),  # type: ignore[arg-type]
        q_tags=padded(seen.q_tags, pad_q, 0),
        k_tags=padded(seen.k_tags, pad_k, -1),
    )
    return size_q, size_k, _heads_first(scaled, size_q), _heads_first(k, size_k), _heads_first(v, size_k), seen


def _heads_first(x: jax.Array, size: int) -> jax.Array:
    """[batch, n, heads, d] -> [batch, heads, n, d] with n a multiple of `size`."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))


def _tables(seen: Seen, size_q: int, size_k: int, keys: int, numbers: jax.Array, by_key: bool = False) -> MaskInfo:
    """Tiles to visit, for a walk along keys or, `by_key`, along queries; a tile that is passed over fetches the next.

    Every block of queries visits a tile, so that its sums are not empty.
    """
    tiles = of_all_rows(seen, seen.first.shape[1], keys, size_q, size_k)
    tiles = tiles | ((jnp.arange(tiles.shape[1]) == 0) & ~tiles.any(1, keepdims=True))
    axis = 0 if by_key else 1
    places = lax.broadcasted_iota(jnp.int32, tiles.shape, axis)
    last = jnp.where(tiles, places, 0).max(axis, keepdims=True)
    following = lax.cummin(jnp.where(tiles, places, last), axis, reverse=True)
    return MaskInfo(
        data_next=following[None],
        mask_next=None,
        block_mask=tiles[None].astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=numbers,  # type: ignore[arg-type]  # said to be numpy's
    )


def _within(number: jax.Array, slot: jax.Array) -> jax.Array:
    return (number >> 16 <= slot) & (slot < number & 0xFFFF)


@functools.cache
def _sizes(size_q: int, size_k: int, keys: int) -> splash.BlockSizes:
    fused = keys // size_k <= FUSED
    return splash.BlockSizes(
        block_q=size_q,
        block_kv=size_k,
        block_q_dkv=size_q,
        block_kv_dkv=size_k,
        block_q_dq=None if fused else size_q,
        block_kv_dq=None if fused else size_k,
        use_fused_bwd_kernel=fused,
    )
