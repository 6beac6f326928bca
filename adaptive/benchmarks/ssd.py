"""The state space recurrence of Mamba-2 by blocks, against one step after another and for several lengths of a block.

All ways of a case run in turns, so that what slows the machine slows each; of every way the fastest run counts.

Measured on a busy machine, hence in processor time, on an AMD EPYC, in float32 with jax 0.10.2; 2 rows of 1024
positions, 8 heads:

| blocks of                          | 16    | 32    | 64    | 128   | 256    |
| ---------------------------------- | ----- | ----- | ----- | ----- | ------ |
| forward                            | 9 ms  | 9 ms  | 14 ms | 16 ms | 25 ms  |
| with backward, keeping the inputs  | 76 ms | 56 ms | 46 ms | 56 ms | 123 ms |
| with backward, keeping matrices    | 72 ms | 55 ms | 57 ms | 67 ms | 128 ms |

One position after another took by the clock about twice as long forward, 13 to 30 times with backward, and 1.1 GiB of
temporaries.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.benchmarks.timing import Cost, fastest, programs, second_run
from kernels_pallas.ssd import chunked, reference, ssd
from kernels_pallas.ssd.blocks import runs_of

CASES = ((8, 32, 4), (4, 256, 8), (2, 1024, 8), (1, 4096, 4))  # batch, positions, heads
DIM, STATE = 64, 128
BLOCKS = (16, 32, 64, 128, 256)

Arrays = tuple[jax.Array, ...]
Way = Callable[..., Arrays]  # (x, dt, a, b, c) -> y and the final state


def by_blocks(block: int, x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> Arrays:
    """The form by blocks in plain jax.numpy, differentiated as it stands: it keeps the matrices of each block."""
    state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]), jnp.float32)
    return chunked.forward(x, dt, a, b, c, runs_of(x, None), state, block=block)


def ways(seq: int) -> dict[str, Way]:
    """The ways to compute it for sequences of this length, "ssd" first."""
    blocks = [block for block in BLOCKS if block < 2 * seq]
    forms = {f"blocks of {block}": functools.partial(by_blocks, block) for block in blocks}
    return {"ssd": ssd, **forms, "one after another": reference.ssd}


def measure(batch: int, seq: int, heads: int, dtype: jnp.dtype, repeats: int) -> dict[str, Cost]:
    """Cost of each way on random inputs, step sizes and decays as a layer starts with."""
    keys = iter(jax.random.split(jax.random.key(0), 7))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    dt = jnp.exp(jax.random.uniform(next(keys), (batch, seq, heads), minval=math.log(1e-3), maxval=math.log(0.1)))
    a = -jax.random.uniform(next(keys), (heads,), minval=1, maxval=16)
    inputs = draw(batch, seq, heads, DIM), dt, a, draw(batch, seq, STATE), draw(batch, seq, STATE)
    d_out = draw(batch, seq, heads, DIM), jnp.zeros((batch, heads, DIM, STATE), jnp.float32)
    made = {name: programs(way, inputs, d_out) for name, way in ways(seq).items()}
    least = fastest({name: runs for name, (runs, _) in made.items()}, repeats, second_run)
    return {name: Cost(least[name][0], least[name][1], bytes_) for name, (_, bytes_) in made.items()}


# Command


def add_rows(table: Table, case: str, costs: dict[str, Cost]) -> None:
    """The milliseconds of `ssd`, and the times of the others over it."""
    base = costs["ssd"]
    for name, cost in costs.items():
        shown = [f"{cost.forward_s / base.forward_s:.2f}", f"{cost.both_s / base.both_s:.2f}"]
        if name == "ssd":
            shown = [f"{cost.forward_s * 1e3:.2f} ms", f"{cost.both_s * 1e3:.2f} ms"]
        table.add_row(case if name == "ssd" else "", name, *shown, f"{cost.temporaries / 2**20:.1f}")


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table."""
    made = options.options("ssd", __doc__ or "", 10)
    options.add_dtype(made)
    given = made.read(arguments)
    dtype = options.dtype_of(given)
    console = Console()
    title = f"state space recurrence in {dtype}, heads of {DIM}, states of {STATE}; times over those of ssd"
    table = Table("batch x positions x heads", "way", "forward", "with backward", "MiB of temporaries", title=title)
    with console.status("") as status:
        for case in CASES:
            name = " x ".join(map(str, case))
            status.update(name)
            add_rows(table, name, measure(*case, dtype, given.repeats))
    console.print(table)
    return 0
