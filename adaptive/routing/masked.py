"""Sums and normalisations over the experts or tokens that count. Gradients are finite where none does."""

import jax
import jax.numpy as jnp


def softmax_over(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of `logits` f32 among those that `mask` bool allows; 0 elsewhere, and where none is.

    Equal to the whole softmax renormalised over the allowed, without its underflow.
    """
    top = jax.lax.stop_gradient(jnp.where(mask, logits, -jnp.inf).max(-1, keepdims=True))
    shifted = jnp.where(mask, logits - jnp.where(jnp.isfinite(top), top, 0.0), 0.0)
    exps = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = exps.sum(-1, keepdims=True)
    return exps / jnp.where(total > 0, total, 1.0)


def mean_choice(probabilities: jax.Array, present: jax.Array | None) -> jax.Array:
    """Mean f32[choices] over the tokens that are present of f32[batch, seq, choices]; present bool[batch, seq]."""
    if present is None:
        return probabilities.mean((0, 1))
    where = present.astype(jnp.float32)
    return (probabilities * where[..., None]).sum((0, 1)) / jnp.maximum(where.sum(), 1.0)


def tokens_in(logits: jax.Array, present: jax.Array | None) -> jax.Array:
    """Number f32[] of tokens that are present, at least 1."""
    count = jnp.float32(logits.shape[0] * logits.shape[1]) if present is None else present.sum().astype(jnp.float32)
    return jnp.maximum(count, 1.0)


def zero_weights(index: jax.Array, weights: jax.Array, valid: jax.Array, experts: int, zero_experts: int) -> jax.Array:
    """f32[batch, seq, zero_experts]: weights of the zero experts, numbered from `experts`, among each token's choices.

    index i32, weights f32, valid bool, all [batch, seq, k].
    """
    number = experts + jnp.arange(zero_experts)
    chosen = (index[..., None] == number) & valid[..., None]
    return jnp.where(chosen, weights[..., None], 0.0).sum(-2)


def share_loss(probabilities: jax.Array, load: jax.Array, present: jax.Array | None) -> jax.Array:
    """E sum_e P_e n_e / sum n, f32[]: the balancing loss where tokens take different numbers of experts; balanced, 1.

    probabilities f32[batch, seq, experts] with gradient, load f32[experts] pairs without.
    """
    share = load / jnp.maximum(load.sum(), 1.0)
    return load.size * (share * mean_choice(probabilities, present)).sum()
