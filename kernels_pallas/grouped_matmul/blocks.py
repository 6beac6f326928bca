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

MOST = 256  # rows of a block; those that a group has beyond a multiple of it form one of the least size that holds them
LEAST = 16

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
            return block.put(d_rows, dot(d, matrix, 1, 1)), block.add(d_weights, group, dot(block.of(rows), d, 0, 0))

        return over_blocks(group, group_sizes, rows.shape[0], step, state)

    zeros = jnp.zeros_like(rows), jnp.zeros_like(weights, jnp.float32)
    d_rows, d_weights = over_groups(visit, group_sizes, zeros)
    return d_rows, d_weights.astype(weights.dtype)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """f32: the sum over one axis of each of two matrices."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


class Block:
    """`size` consecutive rows of one group from row `first`; with `end` given, it is the group's first block, and those
    from `end` on are not of it."""

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

    def add(self, total: jax.Array, group: jax.Array, values: jax.Array) -> jax.Array:
        """`total` [G, ...], 0 at first, with `values` [...] added to one group's, in place within a loop. A group's
        first block reads nothing: most have no other, and gradients are larger than all else."""
        if self.mask is None:
            values = values + lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, values, group, 0)


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
    count = group_sizes[group].astype(jnp.int32)
    sizes = block_sizes(total, group_sizes.size)
    whole = (count - 1) // sizes[-1]
    first, rest = end - count, count - whole * sizes[-1]
    below = 0
    for size in sizes:

        def once(i: jax.Array, state: State, size: int = size) -> State:
            # What does not depend on i, XLA would compute before the loop, and so for every size.
            return step(Block(first + i * size, size, total, first + rest), state)

        fits = (rest > below) & (rest <= size)
        state = lax.fori_loop(0, fits.astype(jnp.int32), once, state)
        below = size

    def full(i: jax.Array, state: State) -> State:
        return step(Block(first + rest + i * sizes[-1], sizes[-1], total, None), state)

    return lax.fori_loop(0, whole, full, state)


def block_sizes(total: int, groups: int) -> list[int]:
    """Rows of blocks, ascending, for groups that share `total` rows.

    From half of what a group has on average to one and a half times that in steps of a quarter, so that little of a
    block is empty; beyond, doubling, since each size is compiled by itself. Where groups are larger than a block, their
    last rows may be any number of it.
    """
    most, average = min(MOST, total), max(1, total // groups)
    step = max(LEAST, -(-min(average, MOST) // 32) * 8)
    first = 1 if average > MOST // 2 else max(1, average // 2 // step)
    sizes = list(range(first * step, min(most, 3 * average // 2 + 1), step)) or [min(step, most)]
    while 2 * sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return sizes if sizes[-1] == most else [*sizes, most]
