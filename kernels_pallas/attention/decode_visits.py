"""Which blocks of a cache the newest queries of each row read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import costs


class Visits(NamedTuple):
    """i32[rows] each: blocks [0, leading) hold sinks, then blocks from `first` on follow; `total` of both."""

    length: jax.Array
    leading: jax.Array
    first: jax.Array
    total: jax.Array


def visits(lengths: jax.Array, queries: int, window: int, sinks: int, block: int) -> Visits:
    """Of rows that hold i32[rows] keys, for their `queries` newest positions; options as for `decode`."""
    after = lax.div(lengths + (block - 1), np.int32(block))
    none = jnp.zeros_like(lengths)
    first = lax.div(jnp.maximum(lengths - (queries - 1) - window, 0), np.int32(block)) if window else none
    leading = jnp.minimum(first, -(-sinks // block))
    return Visits(lengths, leading, first, leading + after - first)


def block_of(t: jax.Array, leading: jax.Array, first: jax.Array) -> jax.Array:
    """The block of the t-th visit."""
    return t + jnp.where(t < leading, 0, first - leading)


def sees(slots: jax.Array, ends: jax.Array, window: int, sinks: int) -> jax.Array:
    """Whether a query that may see keys [0, end) sees those at the slots."""
    near = slots < ends
    if not window:
        return near
    far = slots >= ends - window
    return near & (far | (slots < sinks) if sinks else far)


def cost(q: jax.Array, k: jax.Array, v: jax.Array, slots: int) -> pl.CostEstimate:
    """Of reading a cache of so many slots whole: how much of it is read, is known when a program runs."""
    pairs = q.size // q.shape[-1] * slots
    return costs.cost(4 * pairs * q.shape[-1], pairs, k, v)


def by_key_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[rows, queries, heads, dim] -> [rows, kv_heads, group * queries, dim]: the queries that read the same keys."""
    rows, queries, heads, dim = q.shape
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(rows, kv_heads, -1, dim)


def by_query(x: jax.Array, queries: int) -> jax.Array:
    """The inverse of `by_key_head`."""
    rows, kv_heads, _, dim = x.shape
    return x.reshape(rows, kv_heads, -1, queries, dim).transpose(0, 3, 1, 2, 4).reshape(rows, queries, -1, dim)
