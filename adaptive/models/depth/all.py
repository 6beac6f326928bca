"""Every position takes every pass: looped, recursive and Universal transformers without halting."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Tales
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.models.depth import Carried, Core, Depth, DepthModule, Item, Routed
from adaptive.routing.types import AuxLosses, Trace


@dataclasses.dataclass(frozen=True)
class Settings(Depth):
    """All passes for all positions."""

    equal_passes: ClassVar[bool] = True
    capped: ClassVar[bool] = True
    single: ClassVar[bool] = True

    loop: bool = False  # the passes are one loop, compiled once; False: unrolled, which may run faster

    def check(self, recursive: Any, at: str) -> None:
        if self.loop and (recursive.keys_values != "per_recursion" or recursive.order != "cycle"):
            raise RecipeError(f"{at}.loop=true: equal passes alone are a loop: keys_values=per_recursion, order=cycle")

    def build(self, passes: int, site: Site, keys: Iterator[jax.Array]) -> "All":
        return All(passes, self.loop)


class All(DepthModule):
    """Decides nothing."""

    def __init__(self, passes: int, loop: bool):
        self.passes, self.loop = passes, loop

    def __call__(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        passes = self.passes
        if isinstance(call.passes, int) and call.passes <= passes and not self.loop:
            passes = call.passes
        elif call.passes is not None:
            x, carried = looped(core, x, where, call, carried, call.passes)
            depth = jnp.broadcast_to(call.passes, where.shape).astype(jnp.int32)
            return Routed(x, carried, AuxLosses(), Trace(depth), ())
        depth = jnp.full(where.shape, passes, jnp.int32)
        if self.loop:

            def body(carry: tuple[jax.Array, Carried], r: jax.Array) -> tuple[tuple[jax.Array, Carried], Tales]:
                x, carried, told = core(r, carry[0], where, call, carry[1])
                return (x, carried), told

            (x, carried), told = jax.lax.scan(body, (x, carried), jnp.arange(self.passes, dtype=jnp.int32))
            each = [jax.tree.map(lambda a, r=r: a[r], told) for r in range(self.passes)]
            return Routed(x, carried, AuxLosses(), Trace(depth), each)
        each = []
        for r in range(passes):
            x, carried, told = core(r, x, where, call, carried)
            each.append(told)
        return Routed(x, carried, AuxLosses(), Trace(depth), each)

    def entered(self, x: jax.Array) -> Item:
        return Item(x)

    def passed(self, r: jax.Array, item: Item, new: jax.Array) -> tuple[Item, jax.Array]:
        return Item(new), r + 1 < self.passes


def looped(
    core: Core, x: jax.Array, where: Where, call: Call, carried: Carried, passes: int | jax.Array
) -> tuple[jax.Array, Carried]:
    """So many passes i32[], which may be traced, as a loop; what the core does on the way is not told."""

    def body(r: jax.Array, carry: tuple[jax.Array, Carried]) -> tuple[jax.Array, Carried]:
        x, carried, _ = core(r, carry[0], where, call, carry[1])
        return x, carried

    return jax.lax.fori_loop(0, passes, body, (x, carried))
