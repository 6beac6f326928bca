"""What a layer of experts costs beside a dense feed-forward of equal active FLOPs, on this machine.

Every case is forward and backward (gradients of the input and all parameters) of one layer, 2048 tokens of width 512,
compiled alone; cases are timed in turn within one process, and the least of the repeats is compared.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.layers.feed_forwards import experts as expert_layer
from adaptive.layers.feed_forwards.dense import Dense
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.layers.moe.settings import Execution
from adaptive.layers.site import Site

SEQUENCES, SEQ, WIDTH, HIDDEN, PER_TOKEN = 8, 256, 512, 512, 2
EXPERTS = (8, 16, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled layer, the bytes it needs besides its arguments, and its least time so far."""

    name: str
    call: Callable[[], object]
    temporaries: int
    least: float = float("inf")


def cases(experts: int) -> list[Case]:
    """The dense layer first, then experts of every execution."""
    of = lambda router: expert_layer.Settings(router, experts, HIDDEN)  # noqa: E731
    ec = of(expert_choice.Settings(experts_per_token=PER_TOKEN))
    tc = of(token_choice.Settings(experts_per_token=PER_TOKEN))
    capped = of(token_choice.Settings(experts_per_token=PER_TOKEN, capacity_factor=1.25))
    layers: dict[str, Callable[[jax.Array], nnx.Module]] = {
        "dense, equal active FLOPs": lambda key: Dense(Site(WIDTH), PER_TOKEN * HIDDEN, key),
        "expert choice, slots": routed(ec, "capacity"),
        "expert choice, ragged": routed(ec, "ragged"),
        "token choice, ragged (dropless)": routed(tc, "ragged"),
        "token choice, slots, factor 1.25": routed(capped, "capacity"),
        "token choice, ragged, factor 1.25": routed(capped, "ragged"),
    }
    if experts <= 8:
        layers["token choice, every expert on every token"] = routed(tc, "dense")
    return [case(name, build) for name, build in layers.items()]


def routed(settings: expert_layer.Settings, execution: Execution) -> Callable[[jax.Array], nnx.Module]:
    """What builds a layer of experts, computed that way."""
    chosen = dataclasses.replace(settings, execution=execution)
    return lambda key: chosen.build(Site(WIDTH), key)


def case(name: str, build: Callable[[jax.Array], nnx.Module]) -> Case:
    """The layer that `build` makes of a key, forward and backward."""
    graphdef, params, *rest = nnx.split(build(jax.random.key(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (SEQUENCES, SEQ, WIDTH))

    def loss(params, x):
        out = nnx.merge(graphdef, params, *rest)(x)
        y = out[0] if isinstance(out, tuple) else out
        return jnp.sum(y * y)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    memory = compiled.memory_analysis()
    return Case(name, lambda: compiled(params, x), memory.temp_size_in_bytes if memory else 0)


def measured(found: list[Case], repeats: int) -> list[Case]:
    """The cases with their least time over `repeats` rounds, each round running all of them in turn."""
    for one in found:
        jax.block_until_ready(one.call())
    for _ in range(repeats):
        for i, one in enumerate(found):
            begin = time.perf_counter()
            jax.block_until_ready(one.call())
            found[i] = dataclasses.replace(one, least=min(one.least, time.perf_counter() - begin))
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints the table."""
    made = options.options("experts", __doc__ or "", 7, "rounds, of which the least time counts")
    repeats = made.read(arguments).repeats
    device = jax.devices()[0]
    table = Table(title=f"experts of {HIDDEN} hidden units, {PER_TOKEN} of E per token, {SEQUENCES * SEQ} tokens of "
                  f"width {WIDTH}, {jax.device_count()} x {device.device_kind}, forward and backward")  # fmt: skip
    for column in ("E", "layer", "ms", "of dense", "MiB of temporaries"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for experts in EXPERTS:
        found = measured(cases(experts), repeats)
        for one in found:
            ratio = f"{one.least / found[0].least:.2f}"
            table.add_row(str(experts), one.name, f"{one.least * 1e3:.1f}", ratio, f"{one.temporaries / 2**20:.0f}")
        table.add_section()
    Console(width=130).print(table)
    return 0
