"""Grouped matmul as a loop over blocks of rows, each a dense matmul with one group's matrix.

The number of blocks is read from the group sizes while running, so that empty groups and rows past the last group cost
nothing, and a block is never larger than what it computes by more than a third of the smallest block's rows.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

BLOCKS = (512, 128, 32)  # rows of a block; of a group, as many of the largest as fit, then the smaller ones

State = TypeVar("State")


def forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[R, N]: `reference.grouped_matmul`."""

    def visit(group: jax.Array, out: jax.Array) -> jax.Array:
        matrix = weights[group]
        return over_blocks(
            group,
            group_sizes,
            rows.shape[0],
            lambda block, out: block.put(out, _dot(block.of(rows), matrix, 1, 0)),
            out,
        )

    return over_groups(visit, group_sizes, jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype))


def backward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of rows and weights for the cotangent [R, N] of the result."""

    def visit(group: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix = weights[group]

        def step(block: Block, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_rows, d_matrix = state
            d = block.of_masked(d_out)
            return block.put(d_rows, _dot(d, matrix, 1, 1)), d_matrix + _dot(block.of(rows), d, 0, 0)

        d_rows, d_weights = state
        zero = jnp.zeros(weights.shape[1:], jnp.float32)
        d_rows, d_matrix = over_blocks(group, group_sizes, rows.shape[0], step, (d_rows, zero))
        return d_rows, d_weights.at[group].set(d_matrix.astype(d_weights.dtype))

    return over_groups(visit, group_sizes, (jnp.zeros_like(rows), jnp.zeros_like(weights)))


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


class Block:
    """`size` rows from `start`, of which those in `mask` (bool[size, 1]) belong to the group and are not yet done."""

    def __init__(self, first: jax.Array, end: jax.Array, size: int, total: int):
        self.size = size
        self.start = jnp.minimum(first, total - size)  # the last block reaches back over rows already done
        row = self.start + jnp.arange(size)
        self.mask = ((row >= first) & (row < end))[:, None]

    def of(self, x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self.start, self.size)

    def of_masked(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.mask, self.of(x), 0)

    def put(self, x: jax.Array, values: jax.Array) -> jax.Array:
        merged = jnp.where(self.mask, values.astype(x.dtype), self.of(x))
        return lax.dynamic_update_slice_in_dim(x, merged, self.start, 0)


def over_groups(visit: Callable[[jax.Array, State], State], group_sizes: jax.Array, state: State) -> State:
    """`state` after `visit(group, state)` for each group that has rows."""
    order = jnp.argsort(group_sizes == 0, stable=True)
    return lax.fori_loop(0, (group_sizes > 0).sum(), lambda i, state: visit(order[i], state), state)


def over_blocks(
    group: jax.Array,
    group_sizes: jax.Array,
    total: int,
    step: Callable[[Block, State], State],
    state: State,
) -> State:
    """`state` after `step(block, state)` for blocks that hold the group's rows, each once; `total`: rows of all."""
    end = jnp.cumsum(group_sizes)[group]
    first = end - group_sizes[group]
    sizes = [size for size in BLOCKS if size <= total] or [total]
    for size in sizes:
        # A block that would be three quarters full is taken; of the smallest as many as needed.
        count = (end - first + (size // 4 if size != sizes[-1] else size - 1)) // size
        start = first

        def body(i: jax.Array, state: State, start: jax.Array = start, size: int = size) -> State:
            return step(Block(start + i * size, end, size, total), state)

        state = lax.fori_loop(0, count, body, state)
        first = jnp.minimum(start + count * size, end)
    return state
