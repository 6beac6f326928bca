"""Auxiliary losses of depth routing, all float32."""

import jax
import jax.numpy as jnp
import optax


def mean_over(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Mean f32[] of `values` over the positions where `where` holds (None: all); 0 over no positions."""
    if where is None:
        return values.mean()
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(), 1)


def sampling_loss(logits: jax.Array, chosen: jax.Array, candidates: jax.Array | None) -> jax.Array:
    """Binary cross entropy f32[] that teaches a router to decide alone what top-k decided over the sequence.

    logits f32[batch, n], chosen bool[batch, n], candidates bool[batch, n] or None: all are.
    The mean over one recursion's candidates (MoR paper, appendix on routing); callers sum over recursions.
    """
    bce = optax.sigmoid_binary_cross_entropy(logits, chosen.astype(jnp.float32))
    return mean_over(bce, candidates)


def router_z_loss(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """Mean f32[] of logsumexp(logits over choices)^2; logits f32[batch, n, choices], where bool[batch, n] or None."""
    return mean_over(jnp.square(jax.nn.logsumexp(logits, axis=-1)), where)


def balancing_loss(probabilities: jax.Array, choice: jax.Array, where: jax.Array | None) -> jax.Array:
    """sum_i f_i P_i, f32[]: 1 when softmax routing is perfectly balanced (MoR paper, section 2.2).

    probabilities f32[batch, n, choices] (after alpha), choice i32[batch, n]; f_i is `choices` times the share of tokens
    that chose i, P_i the mean probability of i. The gradient goes through P alone.
    """
    choices = probabilities.shape[-1]
    share = load_of(choice, choices, where)
    mean_probability = jnp.stack([mean_over(probabilities[..., i], where) for i in range(choices)])
    return jnp.sum(choices * share * mean_probability)


def load_of(choice: jax.Array, choices: int, where: jax.Array | None) -> jax.Array:
    """Share of tokens per choice, f32[choices]; choice i32[batch, n], where bool[batch, n] or None."""
    return jnp.stack([mean_over((choice == i).astype(jnp.float32), where) for i in range(choices)])


def updated_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Loss-free balancing: bias f32[choices] moved by `rate` towards the underloaded (MoR paper, section 2.2).

    load f32[choices], already averaged over all devices and micro-batches of the step.
    """
    return bias + rate * jnp.sign(load.mean() - load)
