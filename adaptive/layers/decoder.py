"""The pre-norm decoder layer that every model here is made of."""

import jax
from flax import nnx

from adaptive.layers.attention import LLAMA, Attention, AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.norm import RMSNorm
from adaptive.parallel.rules import constrain


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)).

    `stack` gives every parameter leading layer axes: such a module holds the parameters of many layers and is applied
    one slice at a time.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        norm_eps: float,
        std: float,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        attention: AttentionOptions = LLAMA,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = RMSNorm(width, norm_eps, stack)
        self.attention = Attention(
            width, heads, kv_heads, head_dim, std, attention_key, stack, options=attention, norm_eps=norm_eps
        )
        self.feed_forward_norm = RMSNorm(width, norm_eps, stack)
        self.feed_forward = FeedForward(width, feed_forward, std, feed_forward_key, stack)

    def __call__(self, x: jax.Array, rows: Rows, memory: Memory | None = None) -> tuple[jax.Array, KeyValues]:
        """x [batch, n, width] -> (output of the same shape, residual paths included; keys and values attended to)."""
        update, kv = self.attention(self.attention_norm(x), rows, memory)
        x = x + update
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, "batch", "seq", None), kv
