"""What positions of a row see where that is neither all earlier ones nor all: blocks that see themselves whole."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Reach(NamedTuple):
    """Each position sees those of its document whose index is in [start, before) or in [first, end); i32[rows, n] each,
    start <= before <= first <= end."""

    start: jax.Array
    before: jax.Array
    first: jax.Array
    end: jax.Array


def blocks_of(number: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """(first, end) i32[rows, n]: of each position of whole rows, where its block begins and the position after it.

    number  i32[rows, n], counted from where each document begins; `length` places of a document are a block, and its
            last one may be shorter
    """
    rows, n = number.shape
    slot = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (rows, n))
    begins = (number % length == 0) | (slot == 0)
    first = jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
    following = jax.lax.cummin(jnp.where(begins, slot, n), axis=1, reverse=True)
    return first, jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=n)


def causal_blocks(number: jax.Array, length: int) -> Reach:
    """Positions of whole rows see earlier blocks of their documents, and their own; number: as of `blocks_of`."""
    first, end = blocks_of(number, length)
    slot = jnp.arange(number.shape[1], dtype=jnp.int32)
    return Reach(jnp.clip(slot - number, 0, first), first, first, end)


def paired_blocks(number: jax.Array, length: int) -> Reach:
    """Of rows that hold every text twice, as it is and then with hidden tokens: both see earlier blocks as they are,
    and their own block in their own version.

    number   i32[rows, n] of the texts once, as of `blocks_of`
    returns  i32[rows, 2 n]
    """
    n, own = number.shape[1], causal_blocks(number, length)
    twice = lambda a, more: jnp.concatenate([a, a + more], axis=1)  # noqa: E731
    return Reach(twice(own.start, 0), twice(own.before, 0), twice(own.first, n), twice(own.end, n))


def seen_by(reach: Reach, index: jax.Array, there: jax.Array) -> jax.Array:
    """f32[rows, n]: how many positions each one sees, of those at ascending `index` i32[rows, n] of which `there`
    f32[rows, n] is 1 where one exists."""
    total = jnp.pad(jnp.cumsum(there, axis=1), ((0, 0), (1, 0)))

    def until(bound: jax.Array) -> jax.Array:
        slots = jax.vmap(jnp.searchsorted)(index, bound)
        return jnp.take_along_axis(total, slots, axis=1)

    return until(reach.before) - until(reach.start) + until(reach.end) - until(reach.first)
