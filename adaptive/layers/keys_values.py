"""Keys and values of positions, and how a state of generation keeps them."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.layers.state import Within
from adaptive.layers.where import Where
from adaptive.parallel.rows import set_rows, take_rows
from adaptive.routing.rows import PROMISE
from kernels_pallas.choice import platform

FEWEST = 128  # slots that are read at least
FEW = 16  # queries of a call that reads no more slots than are filled


class KeyValues(NamedTuple):
    """Keys and values of one layer, and where they stand.

    k, v      [rows, slots, kv_heads, head_dim], keys rotated
    index     i32[rows, slots]: place in the row of what a slot holds; -1: it holds nothing
    segments  i32[rows, slots]: documents; None: one per row
    """

    k: jax.Array
    v: jax.Array
    index: jax.Array  # type: ignore[assignment]  # hides tuple.index
    segments: jax.Array | None = None


class ByHead(KeyValues):
    """The same with k and v [rows, kv_heads, slots, head_dim], as states have them on CPUs.

    A batched matmul takes the keys of a head as one matrix there, and would lay them all out anew for every token.
    """


def empty(rows: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> KeyValues:
    """The state before the first position, as it is kept on this platform."""
    index = jnp.full((rows, slots), -1, jnp.int32)
    if platform() == "cpu":
        zeros = jnp.zeros((rows, kv_heads, slots, head_dim), dtype)
        return ByHead(zeros, zeros, index)
    zeros = jnp.zeros((rows, slots, kv_heads, head_dim), dtype)
    return KeyValues(zeros, zeros, index)


def by_position(state: KeyValues) -> KeyValues:
    """With k and v [rows, slots, kv_heads, head_dim]."""
    if not isinstance(state, ByHead):
        return state
    return KeyValues(state.k.swapaxes(1, 2), state.v.swapaxes(1, 2), state.index, state.segments)


def written(state: KeyValues | Within, own: KeyValues, where: Where) -> Any:
    """The state of a layer, wherever it stands, with the positions that exist in their slots. own: by position."""
    if isinstance(state, Within):
        return state._replace(whole=_written(state.whole, own, where, state))
    return _written(state, own, where, None)


def _written(state: KeyValues, own: KeyValues, where: Where, at: Within | None) -> KeyValues:
    exists, by_head = where.exists, isinstance(state, ByHead)
    if at is not None and at.writes is not None:
        exists = at.writes[:, None] if exists is None else exists & at.writes[:, None]

    def one(old: jax.Array, new: jax.Array, by_head: bool = False) -> jax.Array:
        new = new.astype(old.dtype)
        if where.slots is not None:
            return old.at[_index(where.slots, at, by_head)].set(new, mode="drop", unique_indices=True)
        if exists is not None:
            kept = _take(old, where.index, at, by_head)
            new = jnp.where(exists.reshape(*exists.shape, *(1,) * (new.ndim - 2)), new, kept)
        return _put(old, where.index, new, at, by_head)

    k, v = one(state.k, own.k, by_head), one(state.v, own.v, by_head)
    return state._replace(k=k, v=v, index=one(state.index, own.index))


def reached(state: KeyValues | Within, where: Where) -> jax.Array:
    """i32[]: how many slots hold all that positions see which were just written."""
    if where.slots is None:
        return where.index.max() + 1
    slots = (state.whole if isinstance(state, Within) else state).index.shape[-1]
    return jnp.where(where.slots < slots, where.slots, -1).max() + 1


def taken(state: KeyValues, slots: jax.Array) -> KeyValues:
    """What stands in slots i32[rows, n], by position."""
    by_head = isinstance(state, ByHead)
    k, v = _take(state.k, slots, None, by_head), _take(state.v, slots, None, by_head)
    return KeyValues(k, v, take_rows(state.index, slots))


def _take(a: jax.Array, slots: jax.Array, at: Within | None, by_head: bool) -> jax.Array:
    """[rows, n, ...]: a [rows, slots, ...], or [rows, heads, slots, ...] by_head, at slots i32[rows, n]; of [layers,
    ...] those of the layer, and of the rows, that `at` says."""
    if at is None and not by_head:
        return take_rows(a, slots)
    return a.at[_index(slots, at, by_head)].get(**_promise(at))


def _put(a: jax.Array, slots: jax.Array, new: jax.Array, at: Within | None, by_head: bool) -> jax.Array:
    """`a` with `new` [rows, n, ...] where `_take` takes."""
    if at is None and not by_head:
        return set_rows(a, slots, new)
    return a.at[_index(slots, at, by_head)].set(new, **_promise(at))


def _index(slots: jax.Array, at: Within | None, by_head: bool) -> tuple[Any, ...]:
    rows = (jnp.arange(slots.shape[0]) if at is None or at.rows is None else at.rows)[:, None]
    index = (rows, slice(None), slots) if by_head else (rows, slots)
    if at is None:
        return index
    return (at.layer[:, None] if at.layer.ndim else at.layer, *index)


def _promise(at: Within | None) -> dict[str, Any]:
    """What holds of indices; rows that are picked stand in any order."""
    return PROMISE if at is None or at.rows is None else PROMISE | {"indices_are_sorted": False}


def first(state: KeyValues | Within, count: int) -> KeyValues:
    """The first `count` slots of a layer, by position. Of where it stands nothing else is read."""
    whole = state.whole if isinstance(state, Within) else state
    if count == whole.index.shape[-1]:
        return by_position(_own(state))
    assert isinstance(whole, KeyValues)

    def part(a: jax.Array, axis: int = 1) -> jax.Array:
        if not isinstance(state, Within):
            return jax.lax.slice_in_dim(a, 0, count, axis=axis)
        sizes = [1, *a.shape[1:]]
        sizes[axis + 1] = count
        if state.rows is not None:
            return _of_rows(a, state, tuple(sizes[2:]))
        return jax.lax.dynamic_slice(a, (state.layer, *(0,) * (a.ndim - 1)), sizes)[0]

    axis = 2 if isinstance(whole, ByHead) else 1
    segments = None if whole.segments is None else part(whole.segments)
    return by_position(type(whole)(part(whole.k, axis), part(whole.v, axis), part(whole.index), segments))


def _of_rows(a: jax.Array, at: Within, sizes: tuple[int, ...]) -> jax.Array:
    """[n, *sizes]: the beginnings of a [layers, rows, ...] at the layers and rows that `at` says."""
    assert at.rows is not None
    begins = jnp.stack([jnp.broadcast_to(at.layer, at.rows.shape), at.rows], axis=-1)
    kept = tuple(range(1, a.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=kept, collapsed_slice_dims=(0, 1), start_index_map=(0, 1))
    return jax.lax.gather(a, begins, numbers, (1, 1, *sizes), unique_indices=True, mode="promise_in_bounds")


def slots_of(state: KeyValues | Within) -> Where:
    """All slots of a layer as positions of the row, those that hold something as the ones that exist."""
    own = _own(state)
    return Where.whole(own.index.shape, None, own.segments, own.index >= 0)


def without(state: Any, seen: jax.Array) -> Any:
    """A tree of states of layers that hold nothing of places from seen i32[rows] on."""

    def one(node: Any) -> Any:
        if not isinstance(node, KeyValues):
            return node
        return node._replace(index=jnp.where(node.index < seen[:, None], node.index, -1))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, KeyValues))


def counts(state: KeyValues | Within, queries: int) -> tuple[int, ...]:
    """How many slots, ascending, so many queries may read at once: on CPUs a few queries read the least power of two
    that holds all they see, any others all slots."""
    whole = state.whole if isinstance(state, Within) else state
    slots = whole.index.shape[-1]
    if not isinstance(whole, ByHead) or queries > FEW:
        return (slots,)
    return (*itertools.takewhile(lambda n: n < slots, (FEWEST << i for i in itertools.count())), slots)


def _own(state: KeyValues | Within) -> KeyValues:
    own = state.own() if isinstance(state, Within) else state
    assert isinstance(own, KeyValues)
    return own
