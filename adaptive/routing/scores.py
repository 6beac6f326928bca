"""From router logits to gates and to causal decisions."""

from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["sigmoid", "tanh", "softmax", "none"]


def scores_of(logits: jax.Array, activation: Activation, alpha: float) -> jax.Array:
    """The gate's value for each logit: alpha * activation(logit); with "none" alpha is not applied."""
    match activation:
        case "sigmoid":
            return alpha * jax.nn.sigmoid(logits)
        case "tanh":
            return alpha * jnp.tanh(logits)
        case "softmax":
            return alpha * jax.nn.softmax(logits, axis=-1)
        case "none":
            return logits


def passes(logits: jax.Array) -> jax.Array:
    """The causal decision, bool, for each logit: sigmoid(logit) >= 1/2 and tanh(logit) >= 0 alike (the released code's
    accuracy metric; MoR paper, appendix on routing)."""
    return logits >= 0
