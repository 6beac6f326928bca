"""The moving average with a rate of its own at every position, against other forms of the same recurrence.

All ways of a case run in turns, so that what slows the machine slows each; of every way the fastest run counts.

Measured on 2 cores of an AMD EPYC (Zen 4) in float32 with jax 0.10.2, forward and backward pass together:

| batch x n x width | ema      | lax.scan | pairs | blocks of 16 | blocks of 64 |
| ----------------- | -------- | -------- | ----- | ------------ | ------------ |
| 1 x 16 x 1024     | 0.053 ms | 1.20     | 1.61  | 1.55         | 3.97         |
| 1 x 128 x 1024    | 0.262 ms | 1.27     | 2.19  | 2.06         | 2.95         |
| 1 x 512 x 1024    | 0.993 ms | 1.38     | 3.17  | 2.44         | 3.30         |
| 1 x 2048 x 128    | 1.51 ms  | 1.04     | 0.92  | 0.85         | 1.28         |
| 1 x 2048 x 1024   | 4.63 ms  | 1.66     | 6.66  | 5.55         | 6.17         |
| 16 x 16 x 128     | 0.056 ms | 1.43     | 1.34  | 1.63         | 14.3         |
| 16 x 128 x 1024   | 3.81 ms  | 5.28     | 6.51  | 2.42         | 3.64         |
| 16 x 512 x 1024   | 38.9 ms  | 2.37     | 3.75  | 2.47         | 3.67         |
| 16 x 2048 x 128   | 10.5 ms  | 3.99     | 5.02  | 3.76         | 6.51         |
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.benchmarks.timing import fastest, seconds
from kernels_pallas.ema import ema, forms, linear, reference

CASES = tuple(
    (batch, n, width) for batch in (1, 16) for n in (16, 128, 512, 2048) for width in (128, 1024)
    if batch * n * width <= 1 << 23
)  # fmt: skip

Way = Callable[[jax.Array, jax.Array], jax.Array]  # (z, p) -> average


def in_form(recurrence: linear.Recurrence) -> Way:
    """The average by another form of the recurrence, forwards and backwards."""

    def forward(z, p):
        starts, initial = jnp.zeros(p.shape, bool), jnp.zeros((z.shape[0], z.shape[2]), jnp.float32)
        out = linear.forward(recurrence, z, p, starts, initial)
        return out, (z, p, starts, initial, out)

    def backward(kept, d_out):
        z, p, starts, initial, out = kept
        return linear.backward(recurrence, z, p, starts, initial, out, d_out)[:2]

    average = jax.custom_vjp(lambda z, p: forward(z, p)[0])
    average.defvjp(forward, backward)
    return average


WAYS: dict[str, Way] = {
    "ema": ema,
    "lax.scan": reference.ema,
    "pairs": in_form(forms.by_pairs),
    "blocks of 16": in_form(functools.partial(forms.by_blocks, block=16)),
    "blocks of 64": in_form(functools.partial(forms.by_blocks, block=64)),
}


def measure(
    shape: tuple[int, int, int], dtype: jnp.dtype, repeats: int, ways: dict[str, Way] = WAYS
) -> dict[str, tuple[float, float]]:
    """Seconds of the forward pass, and of forward and backward pass, of each way on random [batch, n, width]."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=shape), dtype)
    p = jnp.asarray(rng.uniform(size=shape[:2]), jnp.float32)
    d_out = jnp.asarray(rng.normal(size=shape), jnp.float32)
    runs = {name: _programs(way, z, p, d_out) for name, way in ways.items()}
    # One repeat more: the first touches memory for the first time and is never the fastest.
    least = fastest(runs, repeats + 1, seconds)
    return {name: (forward, both) for name, (forward, both) in least.items()}


def _programs(
    way: Way, z: jax.Array, p: jax.Array, d_out: jax.Array
) -> tuple[Callable[[], object], Callable[[], object]]:
    def both(z, p, d_out):
        out, pull = jax.vjp(way, z, p)
        return out, pull(d_out)

    forward, trained = jax.jit(way).lower(z, p).compile(), jax.jit(both).lower(z, p, d_out).compile()
    return lambda: forward(z, p), lambda: trained(z, p, d_out)


# Command


def add_rows(table: Table, shape: tuple[int, int, int], costs: dict[str, tuple[float, float]]) -> None:
    """The milliseconds of `ema`, and the times of the others over it."""
    base = costs["ema"]
    for name, cost in costs.items():
        if name == "ema":
            table.add_row(" x ".join(map(str, shape)), name, *(f"{seconds * 1e3:.3f} ms" for seconds in cost))
        else:
            table.add_row("", name, *(f"{mine / ours:.2f}" for mine, ours in zip(cost, base, strict=True)))


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table."""
    made = options.options("ema", __doc__ or "", 50)
    options.add_dtype(made)
    given = made.read(arguments)
    dtype = options.dtype_of(given)
    console = Console()
    heading = f"moving average of {dtype}; times over those of ema"
    table = Table("batch x n x width", "way", "forward", "with backward", title=heading)
    with console.status("") as status:
        for shape in CASES:
            status.update(" x ".join(map(str, shape)))
            add_rows(table, shape, measure(shape, dtype, given.repeats))
    console.print(table)
    return 0
