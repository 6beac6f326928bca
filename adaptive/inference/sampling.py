"""Sampling a continuation with a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(
    graphdef: nnx.GraphDef,
    state: Any,
    prompt: np.ndarray,
    length: int,
    key: jax.Array,
    *,
    temperature: float = 0.8,
    vocab: int | None = None,
) -> np.ndarray:
    """`length` tokens i32[length] that continue `prompt` i32[n], drawn from softmax(logits / temperature).

    graphdef, state  of a model with the generation contract (`init_cache`, `prefill`, `decode_step`)
    vocab            ids from here on are never drawn (rows that pad the embedding); None: all may be

    Routed models decide each token's depth causally, as their routers learned to.
    """

    @jax.jit
    def run(state: Any, prompt: jax.Array, key: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)

        def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
            allowed = jnp.arange(logits.shape[-1]) < (vocab or logits.shape[-1])
            return jax.random.categorical(key, jnp.where(allowed, logits / temperature, -jnp.inf)).astype(jnp.int32)

        def step(carry, key):
            token, cache = carry
            out, cache = model.decode_step(token, cache)
            return (draw(out.logits[:, -1], key), cache), token

        out, cache = model.prefill(prompt[None], model.init_cache(1, len(prompt) + length))
        keys = jax.random.split(key, length + 1)
        _, tokens = jax.lax.scan(step, (draw(out.logits[:, -1], keys[0]), cache), keys[1:])
        return tokens[:, 0]

    return np.asarray(run(state, jnp.asarray(prompt, jnp.int32), key))
