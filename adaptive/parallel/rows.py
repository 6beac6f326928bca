"""Chosen positions of sequences that are split over the context axis: they alone travel, to where their slots are, and
back. Slots are split as positions are, so that every device has as many of the chosen ones to compute.

Which positions are chosen is known to every device (4 bytes each), so nothing else is sent. Without a placement, and
where sequences are whole, these are the local operations of `adaptive.routing.rows`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.parallel.exchange import Communicator, Route, ragged_all_to_all, routes
from adaptive.parallel.pairs import permute
from adaptive.parallel.rules import active_placement, along, seq_shards, split
from adaptive.parallel.shard import sharded
from adaptive.routing import boundaries, rows, select
from adaptive.routing.types import Selection

ROW, SLOT = ("batch", "seq"), ("batch",)


def take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [batch, seq, ...] at ascending, unique i32[batch, k] -> [batch, k, ...]."""
    return taken(x, indices) if _travels(x, indices) else rows.take_rows(x, indices)


def add_rows(x: jax.Array, indices: jax.Array, own: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with `own` [batch, k, ...] added at ascending, unique i32[batch, k]."""
    return added(x, indices, own) if _travels(x, indices) else rows.add_rows(x, indices, own)


def gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [batch, n, ...] at i32[batch, k], unique within a row but in any order -> [batch, k, ...]."""
    return taken(x, indices) if _travels(x, indices) else boundaries.gather(x, indices)


def set_rows(x: jax.Array, indices: jax.Array, own: jax.Array) -> jax.Array:
    """x [batch, seq, ...] with the positions ascending, unique i32[batch, k] replaced by own [batch, k, ...]."""
    return _replaced(x, indices, own) if _travels(x, indices) else rows.set_rows(x, indices, own)


def scatter(x: jax.Array, indices: jax.Array, own: jax.Array) -> jax.Array:
    """x [batch, n, ...] with the positions i32[batch, k], unique within a row, replaced by own [batch, k, ...]."""
    return _replaced(x, indices, own) if _travels(x, indices) else boundaries.scatter(x, indices, own)


def _replaced(x: jax.Array, indices: jax.Array, own: jax.Array) -> jax.Array:
    there = jnp.zeros(x.shape[:2], bool)
    there = jax.vmap(lambda there, i: there.at[i].set(True, mode="promise_in_bounds"))(there, indices)
    kept = jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 2)), jnp.zeros((), x.dtype), x)
    return added(kept, indices, own)


def of_whole_rows(fn: Callable[..., Any], *arrays: Any) -> Any:
    """`fn` of arrays [batch, n, ...] or numbers, numbers by position that are compared along the row: computed by every
    device of the context axis, which gets all of them."""
    if seq_shards() == 1:
        return fn(*arrays)
    names = lambda a: SLOT if a.ndim else ()  # noqa: E731
    given, out = jax.tree.map(names, arrays), jax.tree.map(names, jax.eval_shape(fn, *arrays))
    return sharded(fn, given, out)(*arrays)


def select_top(
    scores: jax.Array, gates: jax.Array, capacity: int, limit: jax.Array | int | None = None
) -> Selection:  # fmt: skip
    """`adaptive.routing.select.select_top` of rows that may be split."""
    if isinstance(limit, int):
        return of_whole_rows(lambda scores, gates: select.select_top(scores, gates, capacity, limit), scores, gates)
    return of_whole_rows(
        lambda scores, gates, limit: select.select_top(scores, gates, capacity, limit), scores, gates, limit
    )


def select_first(
    allowed: jax.Array, gates: jax.Array, capacity: int, limit: jax.Array | int | None = None
) -> Selection:  # fmt: skip
    """`adaptive.routing.select.select_first` of rows that may be split."""
    return select_top(select.earlier_is_better(allowed), gates, capacity, limit)


def taken(x: jax.Array, indices: jax.Array, repeats: int = 1, over: str = "seq") -> jax.Array:
    """x [batch, seq, ...] at i32[batch, k] in any order -> [batch, k, ...], split along k as x along seq; zeros for the
    index seq.

    repeats  how often a position may be among a row's k
    over     logical axis that splits positions and slots
    """
    names, comm = _names(x, over), communicator_of_rows(over)

    def local(x: jax.Array, indices: jax.Array) -> jax.Array:
        trip = _Trip.of(indices, x.shape[1], repeats, comm)
        own = _flat(x).at[trip.tokens].get(mode="fill", fill_value=0)
        return trip.sent(own).reshape(x.shape[0], -1, *x.shape[2:])

    return sharded(local, [names, SLOT], names)(x, indices)


def added(x: jax.Array, indices: jax.Array, own: jax.Array, repeats: int = 1, over: str = "seq") -> jax.Array:
    """x [batch, seq, ...] with own [batch, k, ...] added at i32[batch, k]; see `taken`."""
    names, comm = _names(x, over), communicator_of_rows(over)

    def local(x: jax.Array, indices: jax.Array, own: jax.Array) -> jax.Array:
        trip = _Trip.of(indices, x.shape[1], repeats, comm)
        back = trip.returned(_flat(own)).astype(x.dtype)
        return _flat(x).at[trip.tokens].add(back.reshape(-1, *x.shape[2:]), mode="drop").reshape(x.shape)

    return sharded(local, [names, SLOT, names], names)(x, indices, own)


def _names(x: jax.Array, over: str) -> tuple[str, ...]:
    """Of [batch, seq, width] or [batch, seq, heads, head_dim]."""
    return ("batch", over, "heads") if x.ndim == 4 else ("batch", over)


def _travels(x: jax.Array, indices: jax.Array) -> bool:
    """Whether these are activations of split sequences; numbers by position are gathered instead."""
    return seq_shards() > 1 and x.ndim > 2 and None not in (along(x.shape[1]), along(indices.shape[1]))


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


class _Trip(NamedTuple):
    """One device's part in bringing positions to the devices of their slots.

    tokens          i32[most sent]: own positions, flat, in the order of the devices that they go to; out of bounds
                    where there is none
    there, back     ways of `exchange.ragged_all_to_all`
    arrived, slots  i32[own slots]: the place of each slot's row among those that arrive, and the slot of each of these
    most            that one device has for another
    """

    tokens: jax.Array
    there: Route
    back: Route
    arrived: jax.Array
    slots: jax.Array
    most: int
    comm: Communicator

    @staticmethod
    def of(indices: jax.Array, length: int, repeats: int, comm: Communicator) -> "_Trip":
        """Of the slots' positions i32[batch, k] in rows of which each device has `length`."""
        me, parts, (batch, k) = comm.index(), comm.size, indices.shape
        by_device = indices.reshape(batch, parts, k // parts).swapaxes(0, 1).reshape(parts, -1)
        source = by_device // length
        own_slots = by_device.shape[1]
        wanted = (source[None] == jnp.arange(parts, dtype=jnp.int32)[:, None, None]).sum(-1, dtype=jnp.int32)
        there, back = routes(wanted, wanted, me)
        arrived, slots = _sorted(source[me])

        row = jnp.arange(batch, dtype=jnp.int32)[None, :, None] * length
        flat = (by_device.reshape(parts, batch, -1) % length + row).reshape(-1)
        mine = source.reshape(-1) == me
        most_sent = min(flat.size, batch * length * repeats)
        rank = jnp.cumsum(mine, dtype=jnp.int32) - 1
        tokens = jnp.full(most_sent, batch * length, jnp.int32)
        tokens = tokens.at[jnp.where(mine, rank, most_sent)].set(flat, mode="drop")
        return _Trip(tokens, there, back, arrived, slots, min(own_slots, batch * length * repeats), comm)

    def sent(self, own: jax.Array) -> jax.Array:
        """Rows of `tokens` -> rows of this device's slots."""
        sizes = len(self.tokens), len(self.slots)
        come = ragged_all_to_all(own, self.there, self.back, *sizes, self.most, self.comm)
        return permute(come, self.arrived, self.slots)

    def returned(self, own: jax.Array) -> jax.Array:
        """Rows of this device's slots -> rows of `tokens`, 0 where there is none."""
        sizes = len(self.slots), len(self.tokens)
        rows = permute(own, self.slots, self.arrived)
        return ragged_all_to_all(rows, self.back, self.there, *sizes, self.most, self.comm)


def _sorted(source: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For i32[n]: the place of each entry in the stable order of their values, and the entry at each place."""
    entry = jnp.argsort(source, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(entry).at[entry].set(jnp.arange(len(entry), dtype=jnp.int32), unique_indices=True)
    return place, entry


def communicator_of_rows(over: str = "seq") -> Communicator:
    """The devices that have parts of the same rows, for code inside `sharded`; over: logical axis that splits them."""
    current = active_placement()
    assert current is not None
    axes = tuple(axis for axis in getattr(current.rules, over) if current.mesh.shape[axis] > 1)
    return Communicator(split(current.mesh, axes), axis=axes[0] if len(axes) == 1 else axes)
