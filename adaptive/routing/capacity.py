"""Who is dropped when an expert is full (token choice).

weight    each expert keeps its largest weights (Megatron's "probs")
position  each expert keeps its first tokens, whatever choice they were (Megatron's "position", as named); over a whole
          batch tokens are numbered position by position, as Megatron does: the first of all sequences come first
token     pairs in the order (token 0, choice 0), (0, 1), (1, 0), ... (MaxText); over a batch sequence by sequence
choice    all first choices along the sequence, then all second ones (GShard, Flaxformer)
batch     as choice, tokens sorted by their best score, descending (V-MoE's batch-prioritised routing)

Weights are not renormalised after dropping.

How many slots an expert has for n tokens, k experts per token and a factor, in exact arithmetic:

megatron    ceil(n k / E * factor)
maxtext     floor(max(ceil(n k / E) * factor, factor))
flaxformer  round(factor n / E), halves to even: the factor holds k
tutel       k floor(factor ceil(n / E))
"""

from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp

Drop = Literal["weight", "position", "token", "choice", "batch"]
Rule = Literal["megatron", "maxtext", "flaxformer", "tutel"]
Rounding = Literal["down", "up", "nearest"]


def keep_within(
    index: jax.Array,
    weights: jax.Array,
    valid: jax.Array,
    capacity: jax.Array | int,
    experts: int,
    drop: Drop,
    best: jax.Array | None = None,
) -> jax.Array:
    """bool[groups, n, k]: the pairs that find a slot when each expert has `capacity` of them in each group.

    index i32, weights f32, valid bool, all [groups, n, k]: experts of the n tokens of each group. capacity i32[groups]
    or one for all. best f32[groups, n]: what "batch" sorts tokens by; None: their largest weight, which says nothing
    where weights are normalised to a sum. Ties of "weight" and "batch" go to the earlier token.
    """
    best = jnp.where(valid, weights, -jnp.inf).max(-1) if best is None else best
    capacity = jnp.broadcast_to(capacity, index.shape[:1])
    keep = lambda i, w, v, b, c: _keep(i, w, v, b, c, experts, drop)  # noqa: E731
    return jax.vmap(keep)(index, jax.lax.stop_gradient(weights), valid, jax.lax.stop_gradient(best), capacity)


def _keep(index, weights, valid, best, capacity, experts, drop):
    n, k = index.shape
    number = jnp.arange(n * k, dtype=jnp.int32)
    token, choice = number // k, number % k
    order: tuple[jax.Array, ...]
    match drop:
        case "weight":
            order = (-weights.reshape(-1), token)
        case "position" | "token":
            order = (token, choice)
        case "choice":
            order = (choice, token)
        case "batch":
            order = (choice, jnp.repeat(-best, k), token)
    expert = jnp.where(valid, index, experts).reshape(-1)
    *_, place = jax.lax.sort((expert, *order, number), num_keys=1 + len(order))
    sorted_expert = expert[place]
    # A pair's rank among those of its expert: its place in the order less where its expert begins.
    begins = jnp.searchsorted(sorted_expert, jnp.arange(experts + 1))
    rank = number - begins[sorted_expert]
    kept = jnp.zeros(n * k, bool).at[place].set(rank < capacity, unique_indices=True)
    return kept.reshape(n, k) & valid


def slots(
    tokens: Any,
    experts_per_token: float,
    choices: int,
    factor: float,
    rule: Rule = "megatron",
    least: int = 1,
) -> Any:
    """Slots of an expert for `tokens` tokens, an int or i32[...] of them.

    At least `least`, at most `tokens`, and never below 1.
    """
    k, cf, share = _exact(experts_per_token), _exact(factor), Fraction(1, choices)
    match rule:
        case "megatron":
            found = scaled(tokens, k * cf * share, "up")
        case "maxtext":
            found = _larger(scaled(scaled(tokens, k * share, "up"), cf, "down"), int(cf))
        case "flaxformer":
            found = scaled(tokens, cf * share, "nearest")
        case "tutel":
            found = scaled(scaled(scaled(tokens, share, "up"), cf, "down"), k, "down")
    return _larger(-_larger(-_larger(found, least), -tokens), 1)


def scaled(n: Any, ratio: Fraction | float, rounding: Rounding) -> Any:
    """n * ratio as an integer, for n an int or i32[...]; "nearest" takes halves to even.

    Exact for a ratio of small numbers: a product in floating point can be 8.800000000000001 or 2.9999998.
    """
    ratio = _exact(ratio)
    over, under = ratio.numerator, ratio.denominator
    # The quotient apart, so that the product stays within int32.
    rest = n % under * over
    found, left = n // under * over + rest // under, rest % under
    if rounding == "down":
        return found
    if rounding == "up":
        return found + (left > 0)
    return found + ((2 * left > under) | ((2 * left == under) & (found % 2 == 1)))


def _exact(value: Fraction | float) -> Fraction:
    return Fraction(value).limit_denominator(10_000)


def _larger(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)
