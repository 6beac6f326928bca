"""SwiGLU feed-forward."""

import functools

import jax
from flax import nnx

from adaptive.layers.linear import normal_param, use
from adaptive.parallel.rules import constrain


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. The backward pass keeps the two alone and computes the rest again: cheaper than to store it."""
    return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
    """down(swiglu(gate(x), up(x))), no biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        std: float,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        *,
        out_std: float | None = None,
    ):
        """out_std: of the last matrix's initial weights; None: as the others."""
        gate, up, down = jax.random.split(key, 3)
        self.gate = normal_param(gate, (width, hidden), ("width", "ff"), std, stack)
        self.up = normal_param(up, (width, hidden), ("width", "ff"), std, stack)
        self.down = normal_param(down, (hidden, width), ("ff", "width"), std if out_std is None else out_std, stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, width] -> [batch, seq, width]."""
        hidden = swiglu(x @ use(self.gate, x.dtype), x @ use(self.up, x.dtype))
        return constrain(hidden, "batch", "seq", "ff") @ use(self.down, x.dtype)
