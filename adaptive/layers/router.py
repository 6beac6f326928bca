"""Routers: from the residual stream to one logit per position and choice."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import scored
from adaptive.layers.site import normal_param

Network = Literal["linear", "mlp", "wide_mlp"]
EXPANSION = {"linear": 0, "mlp": 2, "wide_mlp": 4}  # hidden width as a multiple of the input's


class Router(nnx.Module):
    """Linear d -> n, or MLP d -> expansion * d -> n with exact GELU; no biases, float32 (MoR paper, appendix).

    The input is the raw residual stream, divided by `temperature`.
    """

    def __init__(
        self,
        width: int,
        choices: int,
        network: Network,
        *,
        temperature: float,
        std: float,
        key: jax.Array,
        group: str = "main",
    ):
        """group: of the optimizer that its parameters are in."""
        hidden_key, out_key = jax.random.split(key)
        self.temperature = temperature
        inner = EXPANSION[network] * width
        self.hidden = normal_param(hidden_key, (width, inner), (None, None), std, group=group) if inner else None
        self.out = normal_param(out_key, (inner or width, choices), (None, None), std, group=group)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, n, width] -> logits f32[batch, n, choices]."""
        x = x.astype(jnp.float32) / self.temperature
        if self.hidden is not None:
            x = jax.nn.gelu(x @ self.hidden[...], approximate=False)
        return scored(x, self.out[...], None)


def matmuls(network: Network, width: int, choices: int) -> tuple[int, ...]:
    """Weights of each of a router's matmuls."""
    inner = EXPANSION[network] * width
    return (width * inner, inner * choices) if inner else (width * choices,)
