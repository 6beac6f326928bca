"""Which of each row's scores are the largest, as a mask and as ascending positions: radix selection, no sort.

Positions come out in order by counting, so that nothing sorts them either, and rows have nothing to do with each other,
so that a sharded batch needs no communication.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.checks import checking, require
from kernels_pallas.choice import by_platform
from kernels_pallas.selection import triton_gpu

BITS = 4  # of a digit: a number has 32 of them, and a pass counts 2 ** BITS - 1 digits


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    if platform == "tpu":
        return "radix selection in XLA, positions by one sort"
    if platform == "gpu":
        missing = triton_gpu.serves()
        return f"radix selection in XLA ({missing})" if missing else "radix selection by jax-triton"
    return "radix selection in XLA, no sort"


def top_positions(scores: jax.Array, count: int) -> jax.Array:
    """i32[rows, count]: where the `count` largest scores of each row are, ascending; as `top_mask`."""
    return by_platform(scores, tpu=_top_positions(count), cuda=_on_gpu(count), default=_top_positions(count))


def _top_positions(count: int) -> Callable[[jax.Array], jax.Array]:
    return lambda scores: positions(top_mask(scores, count), count)


def _on_gpu(count: int) -> Callable[[jax.Array], jax.Array]:
    def run(scores: jax.Array) -> jax.Array:
        if triton_gpu.serves() or scores.shape[-1] > triton_gpu.MOST:
            return positions(top_mask(scores, count), count)
        return triton_gpu.top_positions(scores, count)

    return run


def top_mask(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """The `count` largest scores of each row.

    scores   f32[rows, n]; NaN counts as -inf
    count    at most n, or i32[] or i32[rows, 1], of which what exceeds n counts as n and what is below 0 as 0
    returns  bool[rows, n]; among equal scores the earlier
    """
    keys, count = ordered(scores), jnp.asarray(count, jnp.int32)
    threshold, above = _threshold(keys, jnp.clip(count, 0, scores.shape[-1]))
    equal = keys == threshold
    return (keys > threshold) | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= count - above))


def positions(mask: jax.Array, count: int) -> jax.Array:
    """bool[rows, n] -> i32[rows, count]: where the mask is set in each row, ascending.

    Every row has `count` that are set; with ADAPTIVE_CHECKS=1 that is looked at.
    """
    if checking():
        require(
            (mask.sum(-1) == count).all(), f"a row of the mask does not have the {count} positions that it promises"
        )
    before = jnp.cumsum(mask, -1, dtype=jnp.int32)
    return by_platform(mask, before, tpu=_by_sorting(count), cuda=_by_writing(count), default=_by_writing(count))


def ordered(scores: jax.Array) -> jax.Array:
    """u32 in the order of f32: larger for larger scores, equal for 0 and -0, NaN as -inf."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0.0, scores))
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the `count`-th largest key u32[rows, 1], how many are larger i32[rows, 1]), digit by digit from the highest.

    With a count of 0 it is the largest key that there can be.
    """
    prefix = jnp.zeros((keys.shape[0], 1), jnp.uint32)
    digits = jnp.arange(1, 1 << BITS, dtype=jnp.uint32)
    for shift in range(32 - BITS, -1, -BITS):
        least = prefix + (digits << shift)  # [rows, digits]
        reach = (keys[:, None, :] >= least[..., None]).sum(-1, dtype=jnp.int32)
        # Those of at least the digit are fewer with every digit: as many digits as still reach the count.
        prefix = prefix + ((reach >= count).sum(-1, keepdims=True, dtype=jnp.uint32) << shift)
    return prefix, (keys > prefix).sum(-1, keepdims=True, dtype=jnp.int32)


def _by_writing(count: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Each position is written to the place of its number."""

    def run(mask: jax.Array, before: jax.Array) -> jax.Array:
        place = jnp.where(mask, before - 1, count)
        number = jnp.arange(mask.shape[-1], dtype=jnp.int32)
        put = lambda place: jnp.zeros(count, jnp.int32).at[place].set(number, mode="drop")  # noqa: E731
        return jax.vmap(put)(place)

    return run


def _by_sorting(count: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """For TPUs, which write one by one: what is not set goes to the end."""

    def run(mask: jax.Array, before: jax.Array) -> jax.Array:
        n = mask.shape[-1]
        number = jnp.arange(n, dtype=jnp.int32)
        return jax.lax.sort(jnp.where(mask, number, n), is_stable=False)[..., :count]

    return run
