"""Small parts that routers decide with."""

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import scored
from adaptive.layers.moe.base import Context
from adaptive.layers.site import Site, normal_param


class LinearGate(nnx.Module):
    """weight f32[width, choices]: one logit per choice, float32."""

    def __init__(self, choices: int, site: Site, key: jax.Array):
        self.weight = normal_param(key, (site.width, choices), (None, None), site.std, site.stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, width] -> f32[batch, seq, choices]."""
        return scored(x.astype(jnp.float32), self.weight[...])


def straight_through(logits: jax.Array, temperature: jax.Array | float, context: Context) -> jax.Array:
    """A one-hot sample of softmax(logits) with the gradient of softmax((logits + Gumbel noise) / temperature).

    logits f32[..., choices] -> f32 of the same shape, exactly one-hot (Jang et al. 2017; Maddison et al. 2017). Where
    the context gives no noise, the largest logit.
    """
    draw = lambda key: jax.random.gumbel(key, logits.shape, logits.dtype)  # noqa: E731
    noise = context.drawn(context.noise.logits, draw)
    if noise is not None:
        logits = logits + noise
    soft = jax.nn.softmax(logits / temperature, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def where_present(present: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """bool[batch, seq]: `present`, or everywhere for None."""
    return jnp.ones(shape, bool) if present is None else present
