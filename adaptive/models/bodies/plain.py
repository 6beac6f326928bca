"""A stack, once."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from adaptive.layers import stack as stacks
from adaptive.layers.call import Call, Tales, below
from adaptive.layers.cost import CAPACITIES, Cost, Span, Taken
from adaptive.layers.site import Site
from adaptive.layers.stack import Making, Stack
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.models.bodies import Body, BodyModule, Line, Through
from adaptive.routing.types import AuxLosses, Trace


@dataclasses.dataclass(frozen=True)
class Settings(Body):
    """A stack and a norm behind it: a plain transformer, a Mamba, a hybrid, as its blocks say."""

    stack: stacks.Settings = stacks.Settings(repeats=4)

    @property
    def layers(self) -> int:
        return self.stack.layers

    def check(self, width: int, at: str) -> None:
        self.stack.check(width, f"{at}.stack")

    def refuse_stages(self, stages: int, groups: int) -> str:
        return self.stack.refuse_stages(stages, groups)

    def lines_up(self) -> bool:
        return True

    def parameters(self, width: int) -> int:
        return self.stack.parameters(width) + self.stack.norm_size(width)

    def cost(self, width: int, positions: float, taken: Taken = CAPACITIES, stage: int = 0) -> tuple[Cost, ...]:
        tokens = positions if taken.passes is None else taken.passes[0]
        own = self.stack.cost(width, Span(tokens, tokens, positions))
        return (dataclasses.replace(own, name="main network" if stage else "layers"),)

    def build(
        self, site: Site, keys: Iterator[jax.Array], making: Making, *, stage: int = 0, additions: int = 0
    ) -> "Plain":
        return Plain(self, site, keys, making, additions)

    def family(self) -> str:
        return "vanilla"

    def title(self) -> str:
        attends = any(b.mixer is not None and b.mixer.rotary() for b in self.stack.blocks)
        return "Transformer" if attends else "Stack of state-space layers"


class Plain(BodyModule):
    """The stack's network."""

    def __init__(self, settings: Settings, site: Site, keys: Iterator[jax.Array], making: Making, additions: int):
        self.settings = settings
        site = scaled(site._replace(depth=settings.layers), settings.stack, additions + settings.stack.additions)
        self.stack = Stack(
            settings.stack, site, [next(keys) for _ in settings.stack.blocks], making, norm=True, in_stages=True
        )

    def __call__(self, x: jax.Array, where: Where, call: Call, state: State | None = None) -> Through:
        hidden, state, told, _ = self.stack(x, where, call, state)
        trace = Trace(jnp.ones(where.shape, jnp.int32), told=below("stack", told))
        return Through(hidden, state, AuxLosses(), trace)

    def line(self) -> Line:
        stack = self.stack

        def enter(x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, jax.Array | None, Tales]:
            return x.astype(stack.stream), stack.first_previous(x, call), {}

        def leave(x: jax.Array, _: jax.Array | None, where: Where, call: Call) -> tuple[jax.Array, Tales]:
            assert stack.norm is not None
            return stack.norm(x).astype(stack.making.dtype), {}

        return Line("stack", stack, 1, 0, enter, leave)

    def empty(self, rows: int, slots: int) -> State:
        return self.stack.empty(rows, slots)


def scaled(site: Site, settings: stacks.Settings, additions: int) -> Site:
    """The site of a stack's blocks: matrices that write to a stream with so many additions start smaller, where the
    settings ask for it (H-Net's release, HNet._init_weights)."""
    return site._replace(out_std=site.std * additions**-0.5 if settings.scale_residual else None)
