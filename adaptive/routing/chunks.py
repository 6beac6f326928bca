"""Neighbours and chunks of tokens within documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chunks(NamedTuple):
    """Stretches of at most `length` tokens of one document each.

    of      i32[batch, seq]     number of each position's chunk in its row
    tokens  f32[batch, chunks]  tokens that are present in each; 0: it does not exist
    length  of a whole one
    """

    of: jax.Array
    tokens: jax.Array
    length: int

    def sum(self, values: jax.Array) -> jax.Array:
        """f32[batch, chunks, ...]: sums over the positions of each chunk of values f32[batch, seq, ...]."""
        zeros = jnp.zeros((self.tokens.shape[1], *values.shape[2:]), values.dtype)
        return jax.vmap(lambda of, row: zeros.at[of].add(row))(self.of, values)


def begins(segments: jax.Array) -> jax.Array:
    """bool[batch, n]: the first position of every document of segments i32[batch, n]."""
    first = jnp.ones((len(segments), 1), bool)
    return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)


def numbered(shape: tuple[int, ...], segments: jax.Array | None) -> jax.Array:
    """i32[batch, n]: places of the positions of (batch, n) in their documents; segments None: one per row."""
    position = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segments is None:
        return position
    return position - jax.lax.cummax(jnp.where(begins(segments), position, 0), axis=1)


def neighbours(shape: tuple[int, ...], present: jax.Array | None, segments: jax.Array | None) -> jax.Array:
    """bool[batch, seq - 1]: whether a position of (batch, seq) and the next hold tokens of one document.

    present bool[batch, seq], None: all; segments i32[batch, seq], None: one document per row.
    """
    both = jnp.ones((shape[0], shape[1] - 1), bool)
    if present is not None:
        both = both & present[:, 1:] & present[:, :-1]
    return both if segments is None else both & (segments[:, 1:] == segments[:, :-1])


def chunks(shape: tuple[int, ...], length: int, present: jax.Array | None, segments: jax.Array | None) -> Chunks:
    """The chunks of `length` that each document is cut into from its start; arguments as for `neighbours`."""
    batch, seq = shape
    inside = numbered(shape, segments)
    where = jnp.ones(shape, jnp.float32) if present is None else present.astype(jnp.float32)
    if segments is None:
        of, number = inside // length, -(-seq // length)
    else:
        of, number = jnp.cumsum(inside % length == 0, axis=1, dtype=jnp.int32) - 1, seq
    own = Chunks(of, jnp.zeros((batch, number), jnp.float32), length)
    return own._replace(tokens=own.sum(where))
