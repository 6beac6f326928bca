"""Which tiles of queries times keys attention has to visit: small tables by block, nothing of queries times keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.seen import Seen

MOST = jnp.iinfo(jnp.int32).max
ENTRIES = 5  # of a visit table


class Tiles(NamedTuple):
    """Of each pair of a block of queries and a block of keys, bool[batch, query blocks, key blocks] each.

    near     some query may see some key of its interval
    leading  some query may see some key of its sinks; None: there are no sinks
    full     every query sees every key, and all those keys exist
    """

    near: jax.Array
    leading: jax.Array | None
    full: jax.Array

    @property
    def seen(self) -> jax.Array:
        """Some query may see some key."""
        return self.near if self.leading is None else self.near | self.leading


def of_all_rows(seen: Seen, queries: int, keys: int, block_q: int, block_k: int) -> jax.Array:
    """bool[query blocks, key blocks]: the tiles that some row has to visit; the last blocks may be shorter."""
    rows = max(x.shape[0] for x in seen if x is not None)
    return tiles(padded(seen, rows, keys, block_q, block_k), queries, keys, block_q, block_k).seen.any(0)


def padded(seen: Seen, batch: int, keys: int, block_q: int, block_k: int) -> Seen:
    """`seen` for `batch` rows, by whole blocks: added queries see nothing, added keys do not exist."""

    def whole(x: jax.Array | None, block: int, fill: int) -> jax.Array | None:
        if x is None:
            return None
        x = jnp.broadcast_to(x, (batch, x.shape[1])).astype(jnp.int32)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)

    first, end = whole(seen.first, block_q, 0), whole(jnp.minimum(seen.end, keys), block_q, 0)
    assert first is not None and end is not None
    sinks = whole(seen.sinks, block_q, 0)
    return Seen(first, end, sinks, whole(seen.q_tags, block_q, 0), whole(seen.k_tags, block_k, -1))


def tiles(seen: Seen, queries: int, keys: int, block_q: int, block_k: int) -> Tiles:
    """The tiles of a padded `seen` that has so many queries and keys."""
    real = jnp.arange(seen.first.shape[1]) < queries
    begin = jnp.arange(pl.cdiv(keys, block_k), dtype=jnp.int32) * block_k
    end = begin + block_k
    _, last = _bounds(seen.first, block_q, real)
    shortest, longest = _bounds(seen.end, block_q, real)
    first_seen, _ = _bounds(seen.first, block_q, real & (seen.first < seen.end))
    near = (first_seen < end) & (begin < longest)
    full = (last <= begin) & (end <= shortest)
    leading = None
    if seen.sinks is not None:
        leading = begin < _bounds(jnp.minimum(seen.sinks, seen.end), block_q, real)[1]
    if seen.q_tags is not None and seen.k_tags is not None:
        q_least, q_most = _bounds(seen.q_tags, block_q, real)
        k_least, k_most = (x.swapaxes(1, 2) for x in _bounds(seen.k_tags, block_k, seen.k_tags >= 0))
        all_least = seen.k_tags.reshape(near.shape[0], 1, -1, block_k).min(-1)
        meet = (k_least <= q_most) & (q_least <= k_most)
        near = near & meet
        full = full & (q_least == q_most) & (all_least == k_most) & (k_most == q_most)
        leading = None if leading is None else leading & meet
    return Tiles(near, leading, full)


def by_rows(tiles: Tiles) -> jax.Array:
    """i32[batch, query blocks, ENTRIES]: the visits of each block of queries to blocks of keys."""
    return _table(tiles.near, tiles.full, tiles.leading)


def by_columns(tiles: Tiles) -> jax.Array:
    """i32[batch, key blocks, ENTRIES]: the visits of each block of keys to blocks of queries."""
    return _table(tiles.seen.swapaxes(1, 2), tiles.full.swapaxes(1, 2), None)


def visited(t: jax.Array, leading: jax.Array, begin: jax.Array, full: jax.Array, full_end: jax.Array) -> jax.Array:
    """The block of the t-th visit that needs a mask, from the first entries of a table's row."""
    block = t + jnp.where(t < leading, 0, begin - leading)
    return block + jnp.where(block < full, 0, full_end - full)


def _table(near: jax.Array, full: jax.Array, leading: jax.Array | None) -> jax.Array:
    """Entries: the leading blocks are [0, leading), the others [begin, end), of which [full, full_end) need no mask;
    then how many visits need one. Written as (leading, begin, full, full_end, visits with a mask)."""
    index = jnp.arange(near.shape[-1], dtype=jnp.int32)
    after = lambda which: jnp.where(which, index + 1, 0).max(-1)  # noqa: E731
    front = jnp.zeros(near.shape[:-1], jnp.int32) if leading is None else after(leading)
    end = jnp.maximum(after(near), front)
    begin = jnp.clip(jnp.where(near, index, near.shape[-1]).min(-1), front, end)
    full = full & (index >= begin[..., None])
    full_end = after(full)
    full_begin = after(~full & (index < full_end[..., None]))  # of several runs, the last
    some = full_end > 0
    full_begin, full_end = jnp.where(some, full_begin, end), jnp.where(some, full_end, end)
    masked = front + (full_begin - begin) + (end - full_end)
    return jnp.stack([front, begin, full_begin, full_end, masked], axis=-1).astype(jnp.int32)


def _bounds(x: jax.Array, block: int, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """i32[batch, blocks, 1] each: the least and the most of the numbers of a block that count; MOST and -1 of none."""
    least, most = (jnp.where(counts, x, none).reshape(x.shape[0], -1, block) for none in (MOST, -1))
    return least.min(-1, keepdims=True), most.max(-1, keepdims=True)
