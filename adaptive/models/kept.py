"""What a recursion's core keeps in generation: the states of its passes, as a policy (`adaptive.models.policies`) has
them.

Caches that are alike stand one after another on the first axis of one state, so that a pass may be a traced number.
Those with slots of their own are `Apart`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.layers.keys_values import ByHead, KeyValues
from adaptive.layers.state import State, Within, layers, with_layers
from adaptive.layers.where import Where
from adaptive.models.policies import Policy


class Slots(NamedTuple):
    """What one pass keeps, of the positions that took it alone, without gaps.

    state     of the core once
    filled    i32[1, rows]  slots that hold a position
    overflow  i32[1, rows]  positions that found no slot; a row's results are NaN from the first on
    """

    state: State
    filled: jax.Array
    overflow: jax.Array


class Apart(NamedTuple):
    """One entry for each pass."""

    passes: tuple[Slots, ...]


def empty(policy: Policy, recursive: Any, make: Callable[[int, int], State], rows: int, slots: int) -> State:
    """The state of all passes before the first position, with room for `slots` of each row; make: that of the core
    once, of so many rows and slots."""
    own = policy.slots(recursive, slots)
    if own is None:
        caches = policy.caches(recursive.recursions)
        return jax.tree.map(lambda a: jnp.tile(a, (caches, *(1,) * (a.ndim - 1))), make(rows, slots))
    none = jnp.zeros((1, rows), jnp.int32)
    return Apart(tuple(Slots(make(rows, n), none, none) for n in own))


def at(state: State, cache: Any, caches: int, *, where_it_stands: bool = False) -> Any:
    """What stands in one of so many caches, or where it stands among the others, so that writing moves nothing else."""
    if isinstance(state, Apart):
        return state.passes[cache]

    def one(own: Any) -> Any:
        if own is None:
            return None
        n = _count(own) // caches
        first = jnp.asarray(cache * n, jnp.int32)
        return Within(own, first) if where_it_stands else layers(own, first, n)

    return tuple(one(own) for own in state)


def put(state: State, cache: Any, new: Any) -> State:
    """The state with one cache replaced."""
    if isinstance(state, Apart):
        return Apart((*state.passes[:cache], new, *state.passes[cache + 1 :]))

    def one(old: Any, own: Any) -> Any:
        if own is None:
            return None
        return own.whole if isinstance(own, Within) else with_layers(old, cache * _count(own), own)

    return tuple(one(old, own) for old, own in zip(state, new, strict=True))


class Filling(NamedTuple):
    """A call's positions on their way into `Slots`: at `where`, which says to which slots they go.

    lost  bool[rows, n]: positions that exist and find none
    """

    where: Where
    lost: jax.Array

    @staticmethod
    def of(own: Slots, where: Where) -> "Filling":
        exists = jnp.ones(where.shape, bool) if where.exists is None else where.exists
        most, n = slots_of(own), where.shape[1]
        slot = own.filled[0][:, None] + jnp.cumsum(exists, axis=1, dtype=jnp.int32) - 1
        fits = exists & (slot < most)
        nowhere = most + jnp.arange(n, dtype=jnp.int32)
        return Filling(where.replace(slots=jnp.where(fits, slot, nowhere)), exists & ~fits)

    def done(self, x: jax.Array, own: Slots, after: State) -> tuple[jax.Array, Slots]:
        """(the pass's results [rows, n, width], what it keeps then) where the core left `after`."""
        exists = jnp.ones(self.lost.shape, bool) if self.where.exists is None else self.where.exists
        overflow = own.overflow + self.lost.sum(1, dtype=jnp.int32)
        filled = own.filled + (exists & ~self.lost).sum(1, dtype=jnp.int32)
        spoilt = exists & (own.overflow[0][:, None] + jnp.cumsum(self.lost, axis=1, dtype=jnp.int32) > 0)
        return jnp.where(spoilt[..., None], jnp.nan, x), Slots(after, filled, overflow)


def slots_of(own: Slots) -> int:
    """How many positions of a row it can hold."""
    return max(kv.index.shape[-1] for kv in _keys_values(own))


def lacking(state: State, positions: int) -> bool:
    """Whether some pass anywhere in a state may lack room for so many more positions of each row. Reads the state."""
    found = [own for own in jax.tree.leaves(state, is_leaf=_is_slots) if _is_slots(own)]
    filled = jax.device_get([own.filled for own in found]) if found else []
    return any(int(n.max()) + positions > slots_of(own) for n, own in zip(filled, found, strict=True))


def with_room(state: State, positions: int, step: int) -> State:
    """The state with at least so much room in every pass; what grows does by a multiple of `step`."""

    def one(own: Any) -> Any:
        if not _is_slots(own):
            return own
        more = int(jax.device_get(own.filled).max()) + positions - slots_of(own)
        return own if more <= 0 else own._replace(state=_grown(own.state, -(-more // step) * step))

    return jax.tree.map(one, state, is_leaf=_is_slots)


def _grown(state: State, more: int) -> State:
    def one(kv: Any) -> Any:
        if not isinstance(kv, KeyValues):
            return kv
        by_head = isinstance(kv, ByHead)

        def wider(a: jax.Array, axis: int, fill: int = 0) -> jax.Array:
            return jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)], constant_values=fill)

        axis = 3 if by_head else 2
        return kv._replace(k=wider(kv.k, axis), v=wider(kv.v, axis), index=wider(kv.index, 2, -1))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, KeyValues))


def _keys_values(own: Slots) -> list[KeyValues]:
    is_kv = lambda node: isinstance(node, KeyValues)  # noqa: E731
    return [kv for kv in jax.tree.leaves(own.state, is_leaf=is_kv) if is_kv(kv)]


def _is_slots(node: Any) -> bool:
    return isinstance(node, Slots)


def _count(state: Any) -> int:
    """Layers of one block's state."""
    return int(jax.tree.leaves(state)[0].shape[0])
