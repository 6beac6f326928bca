"""Feed-forward without a gate, with biases, as in GPT-2."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost
from adaptive.layers.feed_forwards import FeedForward, FeedForwardModule
from adaptive.layers.linear import times, use
from adaptive.layers.site import Site, normal_param, param
from adaptive.layers.where import Where
from adaptive.parallel.rules import constrain
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(FeedForward):
    """down(gelu(up x + bias)) + bias, gelu by its tanh form."""

    hidden: int = ranged(512, least=1)  # hidden width

    def build(self, site: Site, key: jax.Array) -> "MLP":
        return MLP(site, self.hidden, key)

    def parameters(self, width: int) -> int:
        return 2 * width * self.hidden + self.hidden + width

    def cost(self, tokens: float, site: Site) -> Cost:
        down = 2.0 * tokens * site.width * self.hidden
        return Cost(feed_forward=2 * down, last=down)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class MLP(FeedForwardModule):
    """down(gelu(up(x)))."""

    def __init__(self, site: Site, hidden: int, key: jax.Array):
        up, down = jax.random.split(key)
        width, stack = site.width, site.stack
        self.up = normal_param(up, (width, hidden), ("width", "ff"), site.std, stack)
        self.up_bias = param(jnp.zeros((*stack, hidden)), ("ff",), stack=stack, role="bias")
        self.down = normal_param(down, (hidden, width), ("ff", "width"), site.writes_std, stack)
        self.down_bias = param(jnp.zeros((*stack, width)), (None,), stack=stack, role="bias")

    def apply(self, x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, Told, None]:
        hidden = _gelu(times(x, use(self.up, x.dtype)) + use(self.up_bias, x.dtype))
        out = times(constrain(hidden, "batch", "seq", "ff"), use(self.down, x.dtype))
        return out + use(self.down_bias, x.dtype), Told(), None
