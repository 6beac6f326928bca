"""Rows of tokens: gathered for groups, and summed back."""

import jax
import jax.numpy as jnp


def gathered(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """x [T, D], tokens i32[...] in bounds -> [..., D]."""
    return x.at[tokens].get(mode="promise_in_bounds")


def summed(rows: jax.Array, tokens: jax.Array, place: jax.Array | None, count: int) -> jax.Array:
    """[count, D]: of each token the sum of its rows [..., D].

    place  i32[count, k], the rows of each token (those that exceed the rows do not exist), where known: the sum is then
           a gather, in a fixed order; tokens is i32[R]
    """
    if place is not None:
        return rows.at[place].get(mode="fill", fill_value=0).sum(1)
    flat = rows.reshape(-1, rows.shape[-1])
    return jnp.zeros((count, flat.shape[-1]), flat.dtype).at[tokens.reshape(-1)].add(flat, mode="promise_in_bounds")
