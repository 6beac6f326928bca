"""Other forms of the recurrence of `linear`, which the benchmark sets beside those in use."""

import jax
import jax.numpy as jnp
from jax import lax


def by_pairs(x: jax.Array, gain: jax.Array, keep: jax.Array, initial: jax.Array, *, reverse: bool = False) -> jax.Array:
    """A tree of depth log n over pairs of (factor, sum); see `linear`."""

    def join(before, after):
        return before[0] * after[0], after[0] * before[1] + after[1]

    pairs = keep[..., None], gain[..., None] * x.astype(jnp.float32)
    factor, out = lax.associative_scan(join, pairs, reverse=reverse, axis=1)
    return out + factor * initial[:, None]


def by_blocks(
    x: jax.Array, gain: jax.Array, keep: jax.Array, initial: jax.Array, *, reverse: bool = False, block: int = 32
) -> jax.Array:
    """Blocks of positions, one after another, each one matmul with the triangle of products of `keep`; see `linear`."""
    batch, n, width = x.shape
    count = -(-n // block)
    pad = count * block - n
    fill = (pad, 0) if reverse else (0, pad)

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), fill, *((0, 0),) * (a.ndim - 2)))
        return a.reshape(batch, count, block, *a.shape[2:]).swapaxes(0, 1)

    gain, keep, values = cut(gain), cut(keep), cut(x.astype(jnp.float32))
    weight, carried = _triangle(keep, reverse)
    inner = jnp.einsum("cbij,cbjw->cbiw", weight * gain[:, :, None], values, precision=lax.Precision.HIGHEST)

    def step(past, at):
        inner, carried = at
        out = inner + carried[..., None] * past[:, None]
        return out[:, 0 if reverse else -1], out

    out = lax.scan(step, initial, (inner, carried), reverse=reverse)[1]
    out = out.swapaxes(0, 1).reshape(batch, count * block, width)
    return out[:, pad:] if reverse else out[:, :n]


def _triangle(keep: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """(f32[..., Q, Q], f32[..., Q]): what position i keeps of j's value, and what it keeps of the block's past.

    Products of `keep` as exponentials of differences of sums of logarithms. A `keep` of 0 has no logarithm: it begins
    a new run, across which nothing is kept.
    """
    if reverse:
        weight, carried = _triangle(keep[..., ::-1], False)
        return weight[..., ::-1, ::-1], carried[..., ::-1]
    zero = keep == 0
    total = jnp.cumsum(jnp.log(jnp.where(zero, 1, keep)), -1)
    run = jnp.cumsum(zero, -1, dtype=jnp.int32)
    within = jnp.tril(run[..., :, None] == run[..., None, :])
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    weight = jnp.exp(jnp.where(within, total[..., :, None] - total[..., None, :], -jnp.inf))
    return weight, jnp.where(run == 0, jnp.exp(total), 0)
