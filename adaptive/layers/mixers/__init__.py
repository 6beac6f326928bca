"""Mixers: what lets positions read each other. One file each, found by its name, with a dataclass `Settings` below
`Mixer` and the module that it builds."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost, Span
from adaptive.layers.rope import Rotary
from adaptive.layers.site import Site
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.settings import Member


@dataclasses.dataclass(frozen=True)
class Mixer(Member):
    """Settings of a mixer.

    both_ways  whether positions can read later ones, and in general those that `Where.reach` names
    """

    door: ClassVar[str] = __name__
    both_ways: ClassVar[bool] = False

    def build(self, site: Site, key: jax.Array) -> "MixerModule":
        raise NotImplementedError

    def kernels(self) -> tuple[str, ...]:
        """Operations that it computes with, each a package of `kernels_pallas` or "routing"."""
        return ()

    def check(self, width: int, at: str) -> None:
        """Raises RecipeError for settings that cannot work in a stream of this width; `at` is their dotted path."""

    def rotary(self) -> tuple[Rotary, ...]:
        """The rotary tables that it reads."""
        return ()

    def parameters(self, width: int) -> int:
        """Parameters of a layer in a stream of this width."""
        raise NotImplementedError

    def cost(self, width: int, span: Span) -> Cost:
        """FLOPs of a layer in a stream of this width; `last` is the matmul that writes to the stream."""
        raise NotImplementedError


class MixerModule(nnx.Module):
    """One layer's mixer; its parameters may be those of many layers, of which a scan slices one.

    in_place  whether it takes the state of a layer where it stands, as a `Within`, and returns one
    """

    in_place = False

    def __call__(self, x: jax.Array, where: Where, call: Call, state: State | None) -> tuple[jax.Array, State, Told]:
        """x [rows, n, width] at `where` -> (its update of the same shape, the state after it, what it did).

        state  of this layer, leaves [rows, ...]: what the same rows left behind; None: nothing. Returned if one was
               given or with `call.keep`; None otherwise
        """
        raise NotImplementedError

    def empty(self, rows: int, slots: int, dtype: Any) -> State:
        """One layer's state [rows, ...] before the first position, with room for `slots` of them."""
        raise NotImplementedError
