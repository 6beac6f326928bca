"""The pre-norm decoder layer that every model here is made of."""

import jax
from flax import nnx

from adaptive.layers.attention import LLAMA, Attention, AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.moe.base import Context, RoutedLayer, Routing
from adaptive.layers.moe.layer import routed_layer
from adaptive.layers.moe_config import MoEConfig
from adaptive.layers.norm import RMSNorm
from adaptive.layers.site import Site
from adaptive.parallel.rules import constrain


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)).

    `site.stack` gives every parameter leading layer axes: such a module holds the parameters of many layers and is
    applied one slice at a time.
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        norm_eps: float,
        key: jax.Array,
        attention: AttentionOptions = LLAMA,
        moe: MoEConfig | None = None,
    ):
        """feed_forward: its hidden width; moe: experts in its place, None: it is dense."""
        attention_key, feed_forward_key = jax.random.split(key)
        width, std, stack = site.width, site.std, site.stack
        self.attention_norm = RMSNorm(width, norm_eps, stack)
        self.attention = Attention(
            width, heads, kv_heads, head_dim, std, attention_key, stack, options=attention, norm_eps=norm_eps
        )
        self.feed_forward: FeedForward | RoutedLayer
        if moe is None:
            self.feed_forward = FeedForward(width, feed_forward, std, feed_forward_key, stack)
        else:
            self.feed_forward = routed_layer(moe, feed_forward, site, feed_forward_key)
        own_norm = isinstance(self.feed_forward, RoutedLayer) and self.feed_forward.own_norm
        self.feed_forward_norm = None if own_norm else RMSNorm(width, norm_eps, stack)

    def __call__(
        self, x: jax.Array, rows: Rows, memory: Memory | None = None, context: Context | None = None
    ) -> tuple[jax.Array, KeyValues, Routing | None]:
        """x [batch, n, width] -> (output of the same shape, residual paths included; keys and values attended to; what
        a routed feed-forward decided)."""
        update, kv = self.attention(self.attention_norm(x), rows, memory)
        x = x + update
        h = x if self.feed_forward_norm is None else self.feed_forward_norm(x)
        if isinstance(self.feed_forward, RoutedLayer):
            here = (context or Context())._replace(present=rows.present(), segments=rows.segments)
            update, routing = self.feed_forward.routed(h, here)
        else:
            update, routing = self.feed_forward(h), None
        return constrain(x + update, "batch", "seq", None), kv, routing
