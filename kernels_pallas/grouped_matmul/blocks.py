"""Grouped matmul as a loop over blocks of rows, each a dense matmul with its group's matrix.

For processors with large matmul libraries and no grouped matmul of their own. The number of blocks is read from the
group sizes while running, so that empty groups and rows past the last group cost nothing.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.varying import like

# Rows of a block. A group takes as many of the largest as it fills, then of the next; the smallest may stay partly
# empty. Few sizes keep compilation short, a small last one keeps waste low; see adaptive/benchmarks/grouped_matmul.py.
BLOCKS = (256, 64, 32)

State = TypeVar("State")


def forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[R, N]: `reference.grouped_matmul`."""

    def visit(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = weights[group]
        step = lambda block, out: block.put(out, dot(block.of(rows), matrix, 1, 0))  # noqa: E731
        return over_blocks(group, group_sizes, rows.shape[0], step, out)

    return over_groups(visit, group_sizes, jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype))


def backward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of rows and weights for the cotangent [R, N] of the result, in one pass over the blocks."""

    def visit(group: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix = weights[group]

        def step(block: Block, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_rows, d_weights = state
            d = block.of(d_out)
            return block.put(d_rows, dot(d, matrix, 1, 1)), add(d_weights, group, dot(block.of(rows), d, 0, 0))

        return over_blocks(group, group_sizes, rows.shape[0], step, state)

    zeros = jnp.zeros_like(rows), jnp.zeros_like(weights, jnp.float32)
    d_rows, d_weights = over_groups(visit, group_sizes, zeros)
    return d_rows, d_weights.astype(weights.dtype)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """f32: the sum over one axis of each of two matrices."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def add(total: jax.Array, group: jax.Array, values: jax.Array) -> jax.Array:
    """`total` [G, ...] with `values` [...] added to one group's, in place within a loop."""
    return lax.dynamic_update_index_in_dim(total, lax.dynamic_index_in_dim(total, group) + values, group, 0)


class Block:
    """`size` consecutive rows of one group from row `first`; with `end` given, those from `end` on are not of it."""

    def __init__(self, first: jax.Array, size: int, total: int, end: jax.Array | None):
        self.size = size
        self.start, self.mask = first, None
        if end is not None:
            self.start = jnp.minimum(first, total - size)  # near the last row, reach back over rows that are done
            row = self.start + jnp.arange(size, dtype=jnp.int32)
            self.mask = ((row >= first) & (row < end))[:, None]

    def of(self, x: jax.Array) -> jax.Array:
        """Its rows of x [R, ...]; 0 for those that are not of the group."""
        values = lax.dynamic_slice_in_dim(x, self.start, self.size)
        return values if self.mask is None else jnp.where(self.mask, values, 0)

    def put(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """x with its rows replaced."""
        values = values.astype(x.dtype)
        if self.mask is not None:
            values = jnp.where(self.mask, values, lax.dynamic_slice_in_dim(x, self.start, self.size))
        return lax.dynamic_update_slice_in_dim(x, values, self.start, 0)


def over_groups(visit: Callable[[jax.Array, State], State], group_sizes: jax.Array, state: State) -> State:
    """`state` after `visit(group, state)` for each group that has rows."""
    order = jnp.argsort(group_sizes == 0, stable=True).astype(jnp.int32)
    count = (group_sizes > 0).sum(dtype=jnp.int32)
    return lax.fori_loop(0, count, lambda i, state: visit(order[i], state), like(group_sizes, state))


def over_blocks(
    group: jax.Array, group_sizes: jax.Array, total: int, step: Callable[[Block, State], State], state: State
) -> State:
    """`state` after `step(block, state)` for blocks that hold each of the group's rows once; `total`: all rows."""
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)[group]
    first = end - group_sizes[group]
    *full, last = [size for size in BLOCKS if size <= total] or [total]
    for size in full:

        def whole(i: jax.Array, state: State, first: jax.Array = first, size: int = size) -> State:
            return step(Block(first + i * size, size, total, None), state)

        count = (end - first) // size
        state = lax.fori_loop(0, count, whole, state)
        first = first + count * size

    def partial(i: jax.Array, state: State) -> State:
        return step(Block(first + i * last, last, total, end), state)

    return lax.fori_loop(0, (end - first + last - 1) // last, partial, state)
