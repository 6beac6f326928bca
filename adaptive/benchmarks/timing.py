"""Timing of ways to compute the same, in turns, so that what slows the machine slows each."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of the forward pass, of forward and backward pass, and bytes of temporaries of the latter."""

    forward_s: float
    both_s: float
    temporaries: int


def programs(way: Callable[..., Any], inputs: tuple[Any, ...], d_out: Any) -> tuple[list[Run], int]:
    """(forward, forward and backward for the cotangent d_out) compiled for these inputs, and the latter's bytes of
    temporaries."""

    def both(inputs: tuple[Any, ...], d_out: Any) -> Any:
        out, pull = jax.vjp(way, *inputs)
        return out, pull(d_out)

    forward = jax.jit(way).lower(*inputs).compile()
    trained = jax.jit(both).lower(inputs, d_out).compile()
    memory = trained.memory_analysis()
    return [lambda: forward(*inputs), lambda: trained(inputs, d_out)], memory.temp_size_in_bytes if memory else 0


def fastest(runs: Mapping[str, Sequence[Run]], repeats: int, seconds: Callable[[Run], float]) -> dict[str, list[float]]:
    """Seconds of the fastest of `repeats` of each run, by name, as `seconds` takes them."""
    least = {name: [math.inf] * len(some) for name, some in runs.items()}
    for _ in range(repeats):
        for name, some in runs.items():
            least[name] = [min(best, seconds(run)) for best, run in zip(least[name], some, strict=True)]
    return least


def seconds(run: Run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def second_run(run: Run) -> float:
    """Seconds of the second of two runs: the first finds the cache as another way left it."""
    jax.block_until_ready(run())
    return seconds(run)
