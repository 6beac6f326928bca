"""Who is dropped when an expert is full (token choice).

weight    each expert keeps its largest weights (Megatron's "probs")
position  each expert keeps its first tokens, whatever choice they were (Megatron's "position", as named)
token     pairs in the order (token 0, choice 0), (0, 1), (1, 0), ... (MaxText): the same tokens as "position"
choice    all first choices along the sequence, then all second ones (GShard, Flaxformer)
batch     as choice, tokens sorted by their largest weight, descending (V-MoE's batch-prioritised routing)

Weights are not renormalised after dropping.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

Drop = Literal["weight", "position", "token", "choice", "batch"]


def keep_within(
    index: jax.Array, weights: jax.Array, valid: jax.Array, capacity: int, experts: int, drop: Drop
) -> jax.Array:
    """bool[groups, n, k]: the pairs that find a slot when each expert has `capacity` of them in each group.

    index i32, weights f32, valid bool, all [groups, n, k]: experts of the n tokens of each group. Ties of "weight" and
    "batch" go to the earlier token.
    """
    return jax.vmap(lambda i, w, v: _keep(i, jax.lax.stop_gradient(w), v, capacity, experts, drop))(
        index, weights, valid
    )


def _keep(index, weights, valid, capacity, experts, drop):
    n, k = index.shape
    number = jnp.arange(n * k, dtype=jnp.int32)
    token, choice = number // k, number % k
    match drop:
        case "weight":
            order = (-weights.reshape(-1), token)
        case "position" | "token":
            order = (token, choice)
        case "choice":
            order = (choice, token)
        case "batch":
            best = jnp.where(valid, weights, -jnp.inf).max(-1)
            order = (choice, jnp.repeat(-best, k), token)
    expert = jnp.where(valid, index, experts).reshape(-1)
    *_, place = jax.lax.sort((expert, *order, number), num_keys=1 + len(order))
    sorted_expert = expert[place]
    # A pair's rank among those of its expert: its place in the order less where its expert begins.
    begins = jnp.searchsorted(sorted_expert, jnp.arange(experts + 1))
    rank = number - begins[sorted_expert]
    kept = jnp.zeros(n * k, bool).at[place].set(rank < capacity, unique_indices=True)
    return kept.reshape(n, k) & valid


def slots(tokens: int, experts_per_token: float, choices: int, factor: float) -> int:
    """Slots of an expert for `tokens` tokens: ceil(tokens * k / choices * factor), at least 1 and at most `tokens`
    (Megatron, MaxText)."""
    # Rounding first: 32 * 2 / 8 * 1.1 must not become 9 through 8.800000000000001 -> 9 by chance of the last bit.
    return max(1, min(tokens, math.ceil(round(tokens * experts_per_token / choices * factor, 9))))
