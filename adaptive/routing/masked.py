"""Sums and normalisations over the experts or tokens that count. Gradients are finite where none does."""

import jax
import jax.numpy as jnp

from adaptive.routing.losses import Sums
from adaptive.routing.types import Summed


def softmax_over(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of `logits` f32 among those that `mask` bool allows; 0 elsewhere, and where none is.

    Equal to the whole softmax renormalised over the allowed, without its underflow.
    """
    top = jax.lax.stop_gradient(jnp.where(mask, logits, -jnp.inf).max(-1, keepdims=True))
    shifted = jnp.where(mask, logits - jnp.where(jnp.isfinite(top), top, 0.0), 0.0)
    exps = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = exps.sum(-1, keepdims=True)
    return exps / jnp.where(total > 0, total, 1.0)


def choice_sums(weights: jax.Array, claims: jax.Array, present: jax.Array | None) -> Sums:
    """What balancing losses are made of: weights f32[batch, seq, choices] summed over the tokens that are present
    ("weight"), the pairs f32[choices] that each choice has ("claims"), and the number f32[] of such tokens ("tokens");
    present bool[batch, seq]; None: all are."""
    where = jnp.ones(weights.shape[:2], jnp.float32) if present is None else present.astype(jnp.float32)
    return {"weight": (weights * where[..., None]).sum((0, 1)), "claims": claims, "tokens": where.sum()}


def zero_weights(index: jax.Array, weights: jax.Array, valid: jax.Array, experts: int, zero_experts: int) -> jax.Array:
    """f32[batch, seq, zero_experts]: weights of the zero experts, numbered from `experts`, among each token's choices.

    index i32, weights f32, valid bool, all [batch, seq, k].
    """
    number = experts + jnp.arange(zero_experts)
    chosen = (index[..., None] == number) & valid[..., None]
    return jnp.where(chosen, weights[..., None], 0.0).sum(-2)


def share_loss(probabilities: jax.Array, load: jax.Array, present: jax.Array | None) -> Summed:
    """E sum_e P_e n_e / sum n: the balancing loss where tokens take different numbers of experts; balanced, 1.

    probabilities f32[batch, seq, experts] with gradient, load f32[experts] pairs without.
    """
    return Summed(choice_sums(probabilities, load, present), _share)


def _share(sums: Sums) -> jax.Array:
    share = sums["claims"] / jnp.maximum(sums["claims"].sum(), 1.0)
    return share.size * (share * sums["weight"]).sum() / jnp.maximum(sums["tokens"], 1.0)
