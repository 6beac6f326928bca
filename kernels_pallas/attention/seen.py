"""Which keys each query sees, as an interval of key slots: what every form of attention here is told instead of a mask.

Keys stand in ascending order, so the keys that are neither later than a query nor outside its window are neighbours.
Documents and keys that do not exist are told by tags, which must agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Seen(NamedTuple):
    """Query i sees key slot j where (first_i <= j or j < sinks_i) and j < end_i and q_tags_i == k_tags_j.

    first, end  i32[batch or 1, queries]
    sinks       i32[batch or 1, queries]; None: 0
    q_tags      i32[batch, queries], at least 0
    k_tags      i32[batch, keys], -1 for a key that does not exist; both tags or neither
    """

    first: jax.Array
    end: jax.Array
    sinks: jax.Array | None = None
    q_tags: jax.Array | None = None
    k_tags: jax.Array | None = None

    def mask(self, keys: int, start: jax.Array | int = 0) -> jax.Array:
        """bool[batch or 1, queries, keys] of the keys from slot `start`, whose tags `k_tags` are."""
        slots = start + jnp.arange(keys, dtype=jnp.int32)
        near = self.first[..., None] <= slots
        if self.sinks is not None:
            near = near | (slots < self.sinks[..., None])
        mask = near & (slots < self.end[..., None])
        if self.q_tags is not None and self.k_tags is not None:
            mask = mask & (self.q_tags[:, :, None] == self.k_tags[:, None, :])
        return mask

    def tiles(self, keys: int, size_q: int, size_k: int) -> jax.Array:
        """bool[query blocks, key blocks]: which tiles must be computed, because some query of some row may see a key.

        keys            how many there are
        size_q, size_k  of the blocks; the last ones may be shorter
        """
        some = self.first < self.end
        low, high = jnp.where(some, self.first, keys), jnp.where(some, self.end, 0)
        low, high = _blocks(low, size_q, keys).min(-1), _blocks(high, size_q, 0).max(-1)
        starts = jnp.arange(0, keys, size_k, dtype=jnp.int32)
        tiles = (starts < high[..., None]) & (starts + size_k > low[..., None])
        if self.sinks is not None:
            sunk = _blocks(jnp.minimum(self.sinks, self.end), size_q, 0).max(-1)
            tiles = tiles | (starts < sunk[..., None])
        if self.q_tags is not None and self.k_tags is not None:
            least, most = _range(self.q_tags, size_q)
            k_least, k_most = _range(self.k_tags, size_k)
            tiles = tiles & (least[..., None] <= k_most[:, None]) & (k_least[:, None] <= most[..., None])
        return tiles.any(0)


_MOST = jnp.iinfo(jnp.int32).max


def _range(tags: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest tag of each block, those below 0 left out."""
    return _blocks(jnp.where(tags < 0, _MOST, tags), size, _MOST).min(-1), _blocks(tags, size, -1).max(-1)


def _blocks(x: jax.Array, size: int, filler: int) -> jax.Array:
    """[rows, n] -> [rows, blocks, size]."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=filler)
    return padded.reshape(x.shape[0], -1, size)
