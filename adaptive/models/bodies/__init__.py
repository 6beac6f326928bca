"""Bodies: the network between embedding and head. One file each, found by its name, with a dataclass `Settings` below
`Body` and the module that it builds."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from adaptive.layers.call import Call, Tales
from adaptive.layers.cost import CAPACITIES, Cost, Taken
from adaptive.layers.site import Site
from adaptive.layers.stack import Making, Stack
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.routing.types import AuxLosses, Trace
from adaptive.settings import Member


@dataclasses.dataclass(frozen=True)
class Body(Member):
    """Settings of a body."""

    door: ClassVar[str] = __name__

    @property
    def layers(self) -> int:
        """Layers of the unrolled network, as a position passes through them."""
        raise NotImplementedError

    @property
    def stored_layers(self) -> int:
        """Layers whose parameters are stored."""
        return self.layers

    @property
    def passes(self) -> int:
        """Recursions that a position can take: how many of `Taken.passes` there are."""
        return 1

    def stages(self) -> "tuple[Body, ...]":
        """This body and those inside it, from the outside in."""
        return (self,)

    def widths(self, width: int) -> tuple[int, ...]:
        """Widths of their streams, the outermost being `width`."""
        return (width,)

    def parameters(self, width: int) -> int:
        """Parameters, of all inside too."""
        raise NotImplementedError

    def unrolled_parameters(self, width: int) -> int:
        """The same were every layer of the unrolled network stored by itself."""
        return self.parameters(width)

    def router_parameters(self, width: int) -> int:
        """Of its parameters those that decide about depth and chunks; those of experts belong to their layers."""
        return 0

    def cost(self, width: int, positions: float, taken: Taken = CAPACITIES, stage: int = 0) -> tuple[Cost, ...]:
        """FLOPs of each stretch for a row of `positions` positions, in the order they run; stage: chunking stages
        around it."""
        raise NotImplementedError

    def chunk_counts(self, positions: int) -> tuple[int, ...]:
        """Slots for chunks of each chunking stage on a row of so many positions, at the end of their schedule."""
        return ()

    def pass_counts(self, positions: int) -> tuple[int, ...]:
        """Of such a row, positions that each recursion computes in training; () where none decides."""
        return ()

    def check(self, width: int, at: str) -> None:
        """Raises RecipeError for settings that cannot work in a stream of this width; `at` is their dotted path."""

    def build(
        self, site: Site, keys: Iterator[jax.Array], making: Making, *, stage: int = 0, additions: int = 0
    ) -> Any:
        """The module. stage: chunking stages around it; additions: to the residual stream, of all around it."""
        raise NotImplementedError

    def at_step(self, step: int) -> "Body":
        """The settings that hold at a training step, where some change on a schedule."""
        return self

    def changes(self) -> tuple[int, ...]:
        """Training steps from which on `at_step` gives other settings."""
        return ()

    def warmup_steps(self) -> int:
        """Training steps during which a router warms up; they need `Call.step`."""
        return 0

    def outer_rate(self) -> float:
        """Multiple of the learning rate of what is around it: embedding and head."""
        return 1.0

    def counts_documents(self) -> bool:
        """Whether positions that are not given are counted from where each document begins."""
        return False

    def refuse_stages(self, stages: int, groups: int) -> str:
        """Why its layers cannot be split over so many stages of a pipeline, each with a part of every group of layers,
        and what can be; empty where they can."""
        inner = self.stages()[-1]
        if inner is not self:
            return inner.refuse_stages(stages, groups)
        return f"{self.title()}: its layers cannot be split over stages; mesh.stage must be 1"

    def lines_up(self) -> bool:
        """Whether all positions go through all of its layers one after another, so that stages can go forward and
        backward by turns (`BodyModule.line`)."""
        return False

    def family(self) -> str:
        """What the model is called in a plan."""
        return self.kind()

    def title(self) -> str:
        """The same for people."""
        return self.family().replace("_", " ").capitalize()


class Through(NamedTuple):
    """What came out of a body: hidden [rows, n, width] after its norm, the state after it (None where none was asked
    for), auxiliary losses, and what was decided."""

    hidden: jax.Array
    state: State | None
    aux: AuxLosses
    trace: Trace


class Line(NamedTuple):
    """A body as a pipeline has it: a stack whose layers are split over stages, and what is before and behind it.

    name    of the stack in the body
    stack   positions go through it `passes` times, all of them
    first   number of its first layer in the unrolled network
    enter   (x, where, call) -> (the stream that enters the stack, logits of the last router of experts before it where
            the stack's first one reads them, what was done)
    leave   (x, those of the stack's last, where, call) -> (hidden after the body's norm, what was done)
    """

    name: str
    stack: Stack
    passes: int
    first: int
    enter: Callable[[jax.Array, Where, Call], tuple[jax.Array, jax.Array | None, Tales]]
    leave: Callable[[jax.Array, jax.Array | None, Where, Call], tuple[jax.Array, Tales]]


class BodyModule(nnx.Module):
    """A body's network."""

    def __call__(self, x: jax.Array, where: Where, call: Call, state: State | None = None) -> Through:
        """x [rows, n, width] at `where`; state: what the same rows left behind (`empty`); None: nothing."""
        raise NotImplementedError

    def empty(self, rows: int, slots: int) -> State:
        """The state before the first position, with room for `slots` of each row; leaves [layers, rows, ...]."""
        raise NotImplementedError

    def line(self) -> Line:
        """The network as a pipeline has it, where `Body.lines_up`."""
        raise NotImplementedError

    def update(self, load: jax.Array | None) -> None:
        """Moves buffers of the depth router, if there is one, by the share f32[passes] of tokens at each depth."""

    def refuse_cache(self) -> str:
        """Why it has no state, so that generation would have to run everything again; empty where it has one."""
        return ""

    def rules_differ(self) -> bool:
        """Whether the rules "train" and "causal" differ, experts aside."""
        return False
