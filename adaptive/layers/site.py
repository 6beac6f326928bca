"""Where a layer stands in a model, and state that no gradient trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Buffer(nnx.Variable):
    """State of a model that no gradient trains (biases, running thresholds, adaptive coefficients)."""


class Site(NamedTuple):
    """Where in a model a layer stands.

    width    of the residual stream
    std      of initial weights
    stack    leading layer axes of its parameters
    uses     times that a block of recursions applies it: buffers have this leading axis; 0: it has none
    layers   number of each stacked layer in the unrolled network, from 0
    depth    layers of the unrolled network
    norm_eps of its normalisations
    """

    width: int
    std: float = 0.02
    stack: tuple[int, ...] = ()
    uses: int = 0
    layers: tuple[int, ...] = (0,)
    depth: int = 1
    norm_eps: float = 1e-5

    def buffer(self, value: jax.Array) -> Buffer:
        """A buffer that starts as `value` in every stacked layer and use."""
        lead = (self.uses,) * bool(self.uses) + self.stack
        return Buffer(jnp.broadcast_to(value, (*lead, *jnp.shape(value))))
