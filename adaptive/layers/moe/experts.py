"""The experts' matrices, and the ways to compute them."""

import dataclasses
import functools
from typing import Protocol

import jax
from flax import nnx

from adaptive.layers.linear import use
from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.site import Site, normal_param
from kernels_pallas.grouped_matmul import grouped_swiglu, routed_swiglu
from kernels_pallas.grouped_matmul.swiglu import ACTIVATIONS

Weights = dict[str, jax.Array]


class Matrices(Protocol):
    """What experts are computed from: parameters, or parts of other parameters."""

    activation: str

    def weights(self, dtype: jax.typing.DTypeLike) -> Weights:
        """up, down and, if there is one, gate in the compute dtype, as `Experts` has them."""

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical names of each matrix's dimensions; those of a stack lead."""


class Experts(nnx.Module):
    """Feed-forward networks of one shape: down(act(x gate) * (x up)), or down(act(x up)) without a gate; no biases.

    gate, up  f32[experts, width, hidden]
    down      f32[experts, hidden, width]
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        experts, hidden = config.experts, config.expert_size
        inward, outward = (experts, site.width, hidden), (experts, hidden, site.width)
        axes = ("experts", "width", "expert_ff")
        self.gate = normal_param(gate, inward, axes, site.std, site.stack) if config.gated else None
        self.up = normal_param(up, inward, axes, site.std, site.stack)
        self.down = normal_param(down, outward, ("experts", "expert_ff", "width"), site.writes_std, site.stack)
        self.activation: str = config.activation

    def weights(self, dtype: jax.typing.DTypeLike) -> Weights:
        """The matrices in the compute dtype, gathered over the axes that only storage is split by."""
        return {name: use(param, dtype) for name, param in self._params().items()}

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical names of each matrix's dimensions; those of the stack lead."""
        return {name: param.get_metadata()["axes"] for name, param in self._params().items()}

    def _params(self) -> dict[str, nnx.Param]:
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: param for name, param in named.items() if param is not None}


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """One device's experts, as `adaptive.parallel.experts` asks for them: exactly the FLOPs of the rows. The backward
    pass keeps rows (x alone where they are gathered here) and what goes into the activation."""

    activation: str

    def rows(self, weights: Weights, rows: jax.Array, group_sizes: jax.Array | None) -> jax.Array:
        return grouped_swiglu(rows, *_matrices(weights), group_sizes, self.activation)

    def summed(
        self,
        weights: Weights,
        x: jax.Array,
        tokens: jax.Array,
        scale: jax.Array,
        place: jax.Array | None,
        group_sizes: jax.Array | None,
    ) -> jax.Array:
        return routed_swiglu(x, tokens, scale, *_matrices(weights), group_sizes, self.activation, place)


def _matrices(weights: Weights) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    return weights.get("gate"), weights["up"], weights["down"]


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def activated(up: jax.Array, gate: jax.Array | None, activation: str) -> jax.Array:
    """act(gate) * up, or act(up). The backward pass keeps the inputs alone."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up
