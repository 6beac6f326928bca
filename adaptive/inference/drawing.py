"""How the next token is drawn from logits: pure functions of one row, f32[vocab], -inf where a token is ruled out."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is done to the logits of a row, in this order, before a token is drawn from their softmax.

    repetition_penalty  makes tokens that the row has already less likely (above 1) or likelier (below 1)
    temperature         logits are divided by it; 0 takes the likeliest token
    top_k               only the k largest stay; 0: all
    top_p               of the probabilities, only the largest that together exceed it stay
    min_p               only tokens with at least this share of the likeliest token's probability stay
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def draw(logits: jax.Array, key: jax.Array, how: Drawing, seen: jax.Array | None = None) -> jax.Array:
    """One token i32[]; seen bool[vocab]: tokens that the row has, which a repetition penalty needs."""
    if how.repetition_penalty != 1:
        assert seen is not None
        logits = penalised(logits, seen, how.repetition_penalty)
    if how.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k:
        logits = largest(logits, how.top_k)
    if how.top_p < 1:
        logits = nucleus(logits, how.top_p)
    if how.min_p > 0:
        logits = near_the_likeliest(logits, how.min_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def penalised(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Logits of tokens that were seen, divided by the penalty where positive and multiplied by it where negative
    (CTRL, Keskar et al. 2019, section 4.1; the second as Hugging Face transformers does)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def largest(logits: jax.Array, k: int) -> jax.Array:
    """The k largest logits, and those equal to the least of them; the others are ruled out."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][-1]
    return jnp.where(logits >= least, logits, -jnp.inf)


def nucleus(logits: jax.Array, p: float) -> jax.Array:
    """The largest logits whose probabilities together just exceed p (H-Net's released generate.py)."""
    ordered = -jnp.sort(-logits)
    probability = jax.nn.softmax(ordered)
    before = jnp.cumsum(probability) - probability
    least = jnp.where(before <= p, ordered, jnp.inf).min()
    return jnp.where(logits >= least, logits, -jnp.inf)


def near_the_likeliest(logits: jax.Array, p: float) -> jax.Array:
    """Logits whose probability is at least p times the largest (min-p sampling, Nguyen et al., arXiv 2407.01082)."""
    return jnp.where(logits >= logits.max() + jnp.log(p), logits, -jnp.inf)
