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
