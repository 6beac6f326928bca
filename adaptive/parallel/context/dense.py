"""Attention over a sequence that is split over the context axis."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adaptive.parallel.context.axis import Context
from adaptive.parallel.context.choice import Schedule, Shapes, chosen
from adaptive.parallel.context.halo import extended
from adaptive.parallel.context.layout import Layout, Shard, exchanged
from adaptive.parallel.context.ring import Gradients, Partial, Pulled, Ring, TokenRing, attend
from kernels_pallas import attention as kernels
from kernels_pallas.attention import Places, over_seen, seen_of
from kernels_pallas.attention.seen import Seen
from kernels_pallas.choice import platform

NOTHING = -1e30  # a log-sum-exp below it is that of no key


@dataclasses.dataclass(frozen=True)
class Dense:
    """Attention of intervals of keys (`Seen`) between shards: `ring.Part`."""

    layout: Layout
    soft_cap: float

    def seen(self, told: Seen, keys: int, q_shard: Shard, k_shard: Shard) -> Seen:
        """What the queries of one shard see of another's `keys`, from what is told of whole rows."""
        mine = queries_of(told, self.layout, q_shard)
        slot = lambda x: self.layout.slot(x, k_shard, keys)  # noqa: E731
        sinks = None if mine.sinks is None else slot(mine.sinks)
        k_tags = None if told.k_tags is None else self.layout.own(told.k_tags, k_shard)
        return Seen(slot(mine.first), slot(mine.end), sinks, mine.q_tags, k_tags)

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, told: Seen, q_shard: Shard, k_shard: Shard) -> Partial:
        out, lse = kernels.attend(q, k, v, self.seen(told, k.shape[1], q_shard, k_shard), self.soft_cap)
        return out.astype(lse.dtype), jnp.where(lse < NOTHING, -jnp.inf, lse)

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, told: Seen, rest: Pulled, q_shard: Shard, k_shard: Shard
    ) -> Gradients:
        return kernels.pulled(q, k, v, self.seen(told, k.shape[1], q_shard, k_shard), *rest, self.soft_cap)


def attention(
    context: Context,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    *,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    soft_cap: float = 0.0,
    schedule: Schedule | None = None,
) -> jax.Array:
    """`kernels_pallas.attention.attention` of whole rows, inside `jax.shard_map` over the context axis, where each
    device has its neighbouring part of every array: [batch, length / parts, ...].

    places    of this part; indices are those of the row. With k_index and as many queries as keys, query i must stand
              where key i does, or before it, if there is a window
    schedule  None: as `chosen`. None changes the result, up to the order of sums
    """
    batch, queries, heads, head_dim = q.shape
    shapes = Shapes(batch, queries, k.shape[1], heads, k.shape[2], head_dim, q.dtype.itemsize)
    same = queries == k.shape[1] and (places.q_index is None) == (places.k_index is None)
    reach = window - 1 if window and not sinks and same else None
    schedule = schedule or chosen(
        context.schedule, shapes, context.parts, nodes=context.nodes, reach=reach, causal=causal, platform=platform()
    )
    how = {"window": window, "sinks": sinks, "causal": causal}
    if schedule == "halo":
        assert reach is not None and causal, "halos are for windows of earlier positions"
        seen = _of_part(context, q.shape[:2], k.shape[:2], places, **how)
        return _over_halo(context, q, k, v, seen, reach, soft_cap)
    even = queries % 2 == 0 and k.shape[1] % 2 == 0
    layout = Layout(context.parts, causal and even)
    told = _of_rows(context, q.shape[:2], k.shape[:2], places, **how)
    if schedule == "gather":
        keys, values = (_gathered(x, context.axis) for x in (k, v))
        mine = queries_of(told, layout, lax.axis_index(context.axis))
        out = over_seen(soft_cap, exchanged(q, layout, context.axis), keys, values, mine)
    else:
        q, k, v = exchanged((q, k, v), layout, context.axis)
        out = scheduled(context, schedule, layout, Dense(layout, soft_cap), q, k, v, told)[0]
    return exchanged(out, layout, context.axis, back=True)


def queries_of(told: Seen, layout: Layout, shard: Shard) -> Seen:
    """What is told of the queries of one shard, and of all keys."""
    mine = jax.tree.map(lambda x: layout.own(x, shard), told._replace(k_tags=None))
    return mine._replace(k_tags=told.k_tags)


def scheduled(
    context: Context, schedule: str, layout: Layout, part: Any, q: jax.Array, k: jax.Array, v: jax.Array, told: Any
) -> Partial:
    """`ring.attend` by name of the schedule."""
    axis, parts = context.axis, context.parts
    if schedule == "token_ring":
        return attend(part, TokenRing(axis, parts, layout.zigzag), q, k, v, told)
    ring = Ring(axis, parts, context.nodes)
    if schedule == "ring" or k.shape[2] == 1:
        return attend(part, ring, q, k, v, told)
    assert schedule == "both_ways", schedule
    some = k.shape[2] // 2  # heads of keys that go one way, and those of their queries
    heads = q.shape[2] // k.shape[2] * some
    one = attend(part, ring, q[:, :, :heads], k[:, :, :some], v[:, :, :some], told)
    other = dataclasses.replace(ring, step=-1)
    two = attend(part, other, q[:, :, heads:], k[:, :, some:], v[:, :, some:], told)
    return jnp.concatenate([one[0], two[0]], axis=2), jnp.concatenate([one[1], two[1]], axis=1)


def _of_part(context: Context, queries: tuple[int, ...], keys: tuple[int, ...], places: Places, **how: Any) -> Seen:
    """What this part's queries see, by slots of the whole row, and the tags of this part's queries and keys."""
    q_index, k_index, q_segments, k_segments, k_valid, *told_by = places
    if q_index is None:
        q_index = lax.axis_index(context.axis) * queries[1] + jnp.arange(queries[1], dtype=jnp.int32)[None]
    if k_index is not None:
        k_index = _of_all(k_index, context.axis)
    where = Places(q_index, k_index, None, None, None, *told_by)
    seen = seen_of(queries, (keys[0], keys[1] * context.parts), where, **how)
    told = seen_of(queries, keys, Places(None, None, q_segments, k_segments, k_valid))
    return seen._replace(q_tags=told.q_tags, k_tags=told.k_tags)


def _of_rows(context: Context, queries: tuple[int, ...], keys: tuple[int, ...], places: Places, **how: Any) -> Seen:
    """The same of all parts, on every device: 4 bytes of each position and number that depends on data."""
    seen = _of_part(context, queries, keys, places, **how)
    if places.q_index is None and places.k_index is None and places.q_end is None:
        known = seen_of((1, queries[1] * context.parts), (1, keys[1] * context.parts), Places(), **how)
        tags = [None if x is None else _of_all(x, context.axis) for x in (seen.q_tags, seen.k_tags)]
        return Seen(known.first, known.end, known.sinks, *tags)
    return jax.tree.map(lambda x: _of_all(x, context.axis), seen)


def _of_all(x: jax.Array, axis: str) -> jax.Array:
    """[batch, n, ...] of every device -> [batch, parts * n, ...]."""
    return lax.all_gather(x, axis, axis=1, tiled=True)


def _over_halo(
    context: Context, q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, reach: int, soft_cap: float
) -> jax.Array:
    """Attention over the own keys and the `reach` before them."""
    keys, values = extended(k, context.axis, context.parts, reach), extended(v, context.axis, context.parts, reach)
    start = lax.axis_index(context.axis) * k.shape[1] - reach
    slot = lambda x: jnp.clip(x - start, 0, keys.shape[1])  # noqa: E731
    k_tags = None if seen.k_tags is None else extended(seen.k_tags, context.axis, context.parts, reach)
    near = seen._replace(first=slot(jnp.maximum(seen.first, 0)), end=slot(seen.end), k_tags=k_tags)
    return over_seen(soft_cap, q, keys, values, near)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axis: str) -> jax.Array:
    """`_of_all` with gradients that are summed in float32."""
    return _of_all(x, axis)


def _scattered(axis: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return (lax.psum_scatter(wide, axis, scatter_dimension=1, tiled=True).astype(g.dtype),)


_gathered.defvjp(lambda x, axis: (_gathered(x, axis), None), _scattered)
