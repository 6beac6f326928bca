"""Routers: from the residual stream to one logit per position and choice."""

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import normal_param

EXPANSION = {"linear": 0, "mlp": 2, "wide_mlp": 4}  # hidden width as a multiple of the input's


class Router(nnx.Module):
    """Linear d -> n, or MLP d -> expansion * d -> n with exact GELU; no biases, float32 (MoR paper, appendix).

    The input is the raw residual stream, divided by `temperature`.
    """

    def __init__(self, width: int, choices: int, *, expansion: int, temperature: float, std: float, key: jax.Array):
        """`expansion` 0 is a linear router."""
        hidden_key, out_key = jax.random.split(key)
        self.temperature = temperature
        inner = expansion * width
        self.hidden = normal_param(hidden_key, (width, inner), (None, None), std) if expansion else None
        self.out = normal_param(out_key, (inner or width, choices), (None, None), std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, n, width] -> logits f32[batch, n, choices]."""
        x = x.astype(jnp.float32) / self.temperature
        if self.hidden is not None:
            x = jax.nn.gelu(x @ self.hidden[...], approximate=False)
        return x @ self.out[...]
