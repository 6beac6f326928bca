"""Gated feed-forward: SwiGLU, GeGLU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax

from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost
from adaptive.layers.feed_forwards import FeedForward, FeedForwardModule
from adaptive.layers.linear import times, use
from adaptive.layers.site import Site, normal_param
from adaptive.layers.where import Where
from adaptive.parallel.rules import constrain
from adaptive.settings import ranged, since

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Settings(FeedForward):
    """down(act(gate x) * up x); silu as in Llama; no biases."""

    hidden: int = ranged(352, least=1)  # hidden width
    activation: Activation = since("silu", before="silu")  # gelu_tanh as in Gemma

    def build(self, site: Site, key: jax.Array) -> "Dense":
        return Dense(site, self.hidden, key, self.activation)

    def parameters(self, width: int) -> int:
        return 3 * width * self.hidden

    def cost(self, tokens: float, site: Site) -> Cost:
        down = 2.0 * tokens * site.width * self.hidden
        return Cost(feed_forward=3 * down, last=down)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def glu(gate: jax.Array, up: jax.Array, activation: Activation) -> jax.Array:
    """act(gate) * up. The backward pass keeps the two alone and computes the rest again: cheaper than to store it."""
    return ACTIVATIONS[activation](gate) * up


class Dense(FeedForwardModule):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, site: Site, hidden: int, key: jax.Array, activation: Activation = "silu"):
        gate, up, down = jax.random.split(key, 3)
        width, std, stack = site.width, site.std, site.stack
        self.activation: Activation = activation
        self.gate = normal_param(gate, (width, hidden), ("width", "ff"), std, stack)
        self.up = normal_param(up, (width, hidden), ("width", "ff"), std, stack)
        self.down = normal_param(down, (hidden, width), ("ff", "width"), site.writes_std, stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, width] -> [batch, seq, width]."""
        hidden = glu(times(x, use(self.gate, x.dtype)), times(x, use(self.up, x.dtype)), self.activation)
        return times(constrain(hidden, "batch", "seq", "ff"), use(self.down, x.dtype))

    def apply(self, x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, Told, None]:
        return self(x), Told(), None
