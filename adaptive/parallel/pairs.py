"""Rows of tokens on one device: gathered for experts, permuted, and summed back. Backward passes are gathers too where
the way back is known, so sums have a fixed order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.grouped_matmul.rows import gathered, summed


@jax.custom_vjp
def take(x: jax.Array, tokens: jax.Array, place: jax.Array | None) -> jax.Array:
    """x[tokens]: x [T, D], tokens i32[...] in bounds -> [..., D].

    place  i32[T, k], the rows of each token (those that exceed the rows do not exist), where known; tokens is i32[R]
    """
    return gathered(x, tokens)


def _take_fwd(x, tokens, place):
    return take(x, tokens, place), (tokens, place, x.shape[0])


def _take_bwd(kept, g):
    tokens, place, count = kept
    return summed(g.astype(jnp.float32), tokens, place, count).astype(g.dtype), None, None


take.defvjp(_take_fwd, _take_bwd)


def combine(rows: jax.Array, weights: jax.Array, tokens: jax.Array, place: jax.Array | None, count: int) -> jax.Array:
    """Sum of weights * rows over the rows of each token: rows [..., D], weights f32[...], tokens i32[...] ->
    f32[count, D]; place as for `take`."""
    weighted = rows.astype(jnp.float32) * weights[..., None]
    return _summed(weighted, tokens, place, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(rows: jax.Array, tokens: jax.Array, place: jax.Array | None, count: int) -> jax.Array:
    return summed(rows, tokens, place, count)


def _summed_fwd(rows, tokens, place, count):
    return summed(rows, tokens, place, count), tokens


def _summed_bwd(count, tokens, g):
    return gathered(g, tokens), None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


@jax.custom_vjp
def permute(rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """rows[index], 0 where index is out of bounds; `inverse` i32[len(rows)] is the way back, alike."""
    return rows.at[index].get(mode="fill", fill_value=0)


permute.defvjp(
    lambda rows, index, inverse: (permute(rows, index, inverse), (index, inverse)),
    lambda kept, g: (permute(g, kept[1], kept[0]), None, None),
)


def segments(starts: jax.Array, sizes: jax.Array, length: int, absent: int) -> jax.Array:
    """i32[length]: the indices starts[i], ..., starts[i] + sizes[i] - 1 of each segment i in turn, then `absent`."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    position = jnp.arange(length, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(ends, position, side="right"), len(sizes) - 1)
    index = starts[segment] + position - (ends - sizes)[segment]
    return jnp.where(position < ends[-1], index, absent).astype(jnp.int32)


def before(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Exclusive cumulative sum."""
    return jnp.cumsum(sizes, axis, dtype=jnp.int32) - sizes


def every(sizes: jax.Array, step: int) -> list[jax.Array]:
    """For sorted rows dealt out in turn to `step` parts, the group sizes of each part: i32[groups] each."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def dealt(rows: jax.Array, part: int) -> jax.Array:
        """How many of the first `rows` rows go to `part`."""
        return (rows - part + step - 1) // step

    return [dealt(ends, part) - dealt(ends - sizes, part) for part in range(step)]


def strided(rows: int, step: int) -> np.ndarray:
    """i32[step, ceil(rows / step)]: row numbers of each part, as `every` deals them; past the last, the last again."""
    each = -(-rows // step)
    return np.minimum(np.arange(each * step).reshape(each, step).T, rows - 1).astype(np.int32)
