"""The pre-norm decoder layer that every model here is made of."""

import jax
from flax import nnx

from adaptive.layers.attention import Attention, KeyValues, Memory, Rows
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.norm import RMSNorm
from adaptive.models.config import TransformerConfig
from adaptive.parallel.rules import constrain


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)).

    `stack` gives every parameter leading layer axes: such a module holds the parameters of many layers and is applied
    through `scan_layers`, one slice at a time.
    """

    def __init__(self, config: TransformerConfig, key: jax.Array, stack: tuple[int, ...] = ()):
        c = config
        attention, feed_forward = jax.random.split(key)
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps, stack)
        self.attention = Attention(
            c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.init_std, attention, stack
        )  # fmt: skip
        self.feed_forward_norm = RMSNorm(c.hidden_size, c.norm_eps, stack)
        self.feed_forward = FeedForward(c.hidden_size, c.intermediate_size, c.init_std, feed_forward, stack)

    def __call__(self, x: jax.Array, rows: Rows, memory: Memory | None = None) -> tuple[jax.Array, KeyValues]:
        """x [batch, n, width] -> (output of the same shape, residual paths included; keys and values attended to)."""
        update, kv = self.attention(self.attention_norm(x), rows, memory)
        x = x + update
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, "batch", "seq", None), kv
