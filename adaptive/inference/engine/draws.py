"""Drawing for many rows at once, each by rules of its own that the program learns when it runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.inference.drawing import Drawing, near_the_likeliest, penalised


class Rules(NamedTuple):
    """The fields of a `Drawing` as arrays [rows]."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


def usual(rows: int) -> Rules:
    """The default rules in every row."""
    return Rules(*(jnp.full(rows, value) for value in rules_of(Drawing())))


def rules_of(how: Drawing) -> Rules:
    """The same as numpy scalars, which a program takes without being compiled anew."""
    penalty = np.float32(how.repetition_penalty)
    return Rules(
        np.float32(how.temperature), np.int32(how.top_k), np.float32(how.top_p), np.float32(how.min_p), penalty
    )


def draw_rows(logits: jax.Array, seeds: jax.Array, numbers: jax.Array, how: Rules, seen: jax.Array) -> jax.Array:
    """i32[rows]: token number `numbers` i32[rows] of each row, as `drawing.draw` draws it by the key of its seed
    and stream u32[rows, 2] and its number.

    logits f32[rows, vocab]; seen bool[rows, vocab]: tokens that each row has
    """
    logits = warped(logits, how, seen)
    likeliest = logits.argmax(-1).astype(jnp.int32)

    def drawn(logits: jax.Array) -> jax.Array:
        token = jax.vmap(jax.random.categorical)(keys(seeds, numbers), logits).astype(jnp.int32)
        return jnp.where(how.temperature == 0, likeliest, token)

    return jax.lax.cond((how.temperature > 0).any(), drawn, lambda logits: likeliest, logits)


def keys(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    """Keys [rows] of the tokens of these numbers: those of `Sampler` for the prompt of this number."""

    def one(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), number), seed[1])

    return jax.vmap(one)(seeds, numbers)


def warped(logits: jax.Array, how: Rules, seen: jax.Array) -> jax.Array:
    """f32[rows, vocab]: logits after penalty, temperature and what each row rules out; of a row with temperature 0
    after its penalty alone. What no row asks for is not computed."""
    penalty, vocab = how.repetition_penalty, logits.shape[-1]

    def fined(logits: jax.Array) -> jax.Array:
        return jax.vmap(penalised)(logits, seen, penalty)

    logits = jax.lax.cond((penalty != 1).any(), fined, lambda logits: logits, logits)
    draws = how.temperature > 0
    logits = logits / jnp.where(draws, how.temperature, 1)[:, None]
    few, part = draws & (how.top_k > 0), draws & (how.top_p < 1)

    def restricted(logits: jax.Array) -> jax.Array:
        ordered = -jnp.sort(-logits, axis=-1)
        k = jnp.where(few, jnp.minimum(how.top_k, vocab), vocab)
        least = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
        ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        most = jnp.where(before <= how.top_p[:, None], ordered, jnp.inf).min(-1, keepdims=True)
        return jnp.where(logits >= jnp.where(part[:, None], jnp.maximum(least, most), least), logits, -jnp.inf)

    logits = jax.lax.cond((few | part).any(), restricted, lambda logits: logits, logits)

    def near(logits: jax.Array) -> jax.Array:
        kept = jax.vmap(near_the_likeliest)(logits, how.min_p)
        return jnp.where((draws & (how.min_p > 0))[:, None], kept, logits)

    return jax.lax.cond((how.min_p > 0).any(), near, lambda logits: logits, logits)
