"""What generation keeps. A part's state is any tree whose leaves are [layers, rows, ...]; of a recursion's core the
passes of all layers stand one after another on the first axis. Rows are taken, put and cleared by one function each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

State = Any


def take(state: State, rows: jax.Array) -> State:
    """The state of these rows i32[k]."""
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=1), state)


def put(state: State, rows: jax.Array, new: State) -> State:
    """The state with these rows i32[k], all different, replaced."""
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b.astype(a.dtype), unique_indices=True), state, new)


def clear(state: State, rows: jax.Array, empty: State) -> State:
    """The state with these rows i32[k] as in `empty`, a state of one row that has seen nothing."""
    one = jax.tree.map(lambda a: jnp.broadcast_to(a[:, :1], (a.shape[0], len(rows), *a.shape[2:])), empty)
    return put(state, rows, one)


def layers(state: State, start: Any, count: int) -> State:
    """The layers start .. start + count - 1; start may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, count), state)


def with_layers(state: State, start: Any, new: State) -> State:
    """The state with the layers from `start` on replaced."""
    put_in = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), start, 0)  # noqa: E731
    return jax.tree.map(put_in, state, new)


class Within(NamedTuple):
    """The state of one layer where it stands, among those of all layers of a stack: what a layer writes into it moves
    nothing else.

    whole  leaves [layers, rows, ...]
    layer  i32[], or with `rows` i32[n]: one for each of them
    rows   i32[n], all different: those that are computed; None: all rows of the layer
    writes bool[n]: those whose keys and values enter what they read; None: all
    """

    whole: State
    layer: jax.Array
    rows: jax.Array | None = None
    writes: jax.Array | None = None

    def own(self) -> State:
        """The layer's own state."""
        if self.rows is not None:
            layer, rows = jnp.broadcast_to(self.layer, self.rows.shape), self.rows
            return jax.tree.map(lambda a: a.at[layer, rows].get(mode="promise_in_bounds"), self.whole)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, self.layer, 0, False), self.whole)

    def replaced(self, new: State) -> "Within":
        """With the layer's own state replaced."""
        if self.rows is not None:
            layer, rows = jnp.broadcast_to(self.layer, self.rows.shape), self.rows
            put_at = lambda a, b: a.at[layer, rows].set(b.astype(a.dtype), unique_indices=True)  # noqa: E731
            return self._replace(whole=jax.tree.map(put_at, self.whole, new))
        put_in = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), self.layer, 0)  # noqa: E731
        return self._replace(whole=jax.tree.map(put_in, self.whole, new))


def repeated(state: State, count: int) -> State:
    """One layer's state [rows, ...] as that of `count` layers."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), state)
