"""From scores to a Selection with static shapes."""

import jax
import jax.numpy as jnp

from adaptive.routing.types import Selection
from kernels_pallas.selection import top_mask, top_positions

MOST_ARGMAXES = 8


def select_top(
    scores: jax.Array, gates: jax.Array, capacity: int, limit: jax.Array | int | None = None
) -> Selection:  # fmt: skip
    """The `capacity` best-scored positions of each sequence, in ascending order.

    scores   f32[batch, seq]  larger is better; -inf where a position must not be taken
    gates    f32[batch, seq]  what the selected positions are weighted by; keeps its gradient
    limit    i32[] or i32[batch, 1]: at most this many of the capacity are valid; None: all
    returns  Selection of [batch, capacity]

    Ties go to the earlier position. A slot that holds nothing (its score is -inf, or it lies past `limit`) has weight
    0, valid False and the index of a position that is not selected, so indices are always unique. The gradient of the
    selection itself is zero (MoR paper, section 2.2: it flows through the gate). `seq` must not be sharded.
    """
    if capacity == scores.shape[-1] and limit is None:
        indices = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), scores.shape)
        return _gated(indices, gates, jnp.isfinite(scores))
    ranked = jax.lax.stop_gradient(scores)
    indices = top_positions(ranked, capacity)
    at = lambda values: jnp.take_along_axis(values, indices, axis=-1, mode="promise_in_bounds")  # noqa: E731
    ranked = at(ranked)
    valid = jnp.isfinite(ranked)
    if limit is not None:
        valid = valid & top_mask(ranked, limit)
    return _gated(indices, at(gates), valid)


def select_first(
    allowed: jax.Array, gates: jax.Array, capacity: int, limit: jax.Array | int | None = None
) -> Selection:  # fmt: skip
    """The first `capacity` allowed positions of each sequence: a causal choice, whatever follows.

    allowed bool[batch, seq], gates f32[batch, seq] -> Selection of [batch, capacity]; limit as in `select_top`.
    """
    return select_top(earlier_is_better(allowed), gates, capacity, limit)


def earlier_is_better(allowed: jax.Array) -> jax.Array:
    """f32 scores by which the first of the allowed positions bool[batch, seq] are the best."""
    return jnp.where(allowed, -jnp.arange(allowed.shape[-1], dtype=jnp.float32), -jnp.inf)


def _gated(indices: jax.Array, weights: jax.Array, valid: jax.Array) -> Selection:
    return Selection(indices, jnp.where(valid, weights, 0.0), valid)


def top_choices(scores: jax.Array, k: int) -> jax.Array:
    """i32[..., k]: the k largest of the last axis of `scores` f32[..., choices], best first, ties to the lower one."""
    scores = jax.lax.stop_gradient(scores)
    if k > MOST_ARGMAXES:
        number = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
        return jax.lax.sort((-scores, number), num_keys=1, is_stable=True)[1][..., :k]
    picked = []
    for _ in range(k):  # for a few, argmax by argmax is the fastest that XLA also partitions over a sharded batch
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        picked.append(best)
        scores = jnp.where(jnp.arange(scores.shape[-1]) == best[..., None], -jnp.inf, scores)
    return jnp.stack(picked, axis=-1)
