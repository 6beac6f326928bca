"""Grouped matmul and the grouped feed-forward against a dense matmul of as many FLOPs and against other ways.

All ways of a case run in turns, so that what slows the machine slows each; of every way the fastest run counts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options
from adaptive.benchmarks.timing import Cost, fastest, seconds
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu

ROWS, WIDTH = 4096, 512  # 2,048 tokens with two experts each
RAGGED_GROUPS = 8  # where `lax.ragged_dot` has no kernel it costs a dense matmul per group; with more it takes minutes


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows and matrices: `rows` of `width` times `groups` matrices to `hidden`.

    load  "balanced": equal groups; "skewed": sizes like 1/rank, in random order; "one": one group has all rows
    """

    hidden: int
    groups: int
    load: str
    rows: int = ROWS
    width: int = WIDTH

    @property
    def name(self) -> str:
        return f"{self.groups} x {self.hidden}, {self.load}"

    def group_sizes(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        if self.load == "one":
            return np.eye(self.groups, dtype=np.int32)[self.groups // 2] * np.int32(self.rows)
        share = 1 / (np.arange(self.groups) + 1 if self.load == "skewed" else np.ones(self.groups))
        whole = np.floor(rng.permutation(share / share.sum()) * self.rows).astype(np.int32)
        whole[whole.argmax()] += self.rows - whole.sum()
        return whole


LOADS = ("balanced", "skewed", "one")
MATMULS = tuple(Case(n, g, load) for n in (256, 1024) for g in (8, 64) for load in LOADS)
SWIGLUS = tuple(Case(f, g, load) for f, g in ((512, 8), (1024, 8), (256, 64)) for load in LOADS)


Way = Callable[..., jax.Array]  # (rows, matrices, group_sizes) -> result


def measure(
    case: Case, dense: Way, ways: dict[str, Way], shapes: Sequence[tuple[int, int]], dtype: jnp.dtype, repeats: int
) -> dict[str, Cost]:
    """Cost of each way on random rows and one matrix of each shape for every group, and of "dense" on one group's."""
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 2))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype) / math.sqrt(case.width)  # noqa: E731
    rows, matrices = draw(case.rows, case.width), tuple(draw(case.groups, *shape) for shape in shapes)
    rest = jnp.asarray(case.group_sizes()), draw(case.rows, shapes[-1][1])
    programs = {"dense": _programs(dense, rows, tuple(matrix[0] for matrix in matrices), *rest)}
    programs |= {name: _programs(way, rows, matrices, *rest) for name, way in ways.items()}
    # One repeat more: the first touches memory for the first time and is never the fastest.
    least = fastest({name: runs for name, (runs, _) in programs.items()}, repeats + 1, seconds)
    return {name: Cost(least[name][0], least[name][1], bytes_) for name, (_, bytes_) in programs.items()}


def _programs(
    way: Way, rows: jax.Array, matrices: tuple[jax.Array, ...], sizes: jax.Array, d_out: jax.Array
) -> tuple[list[Callable[[], object]], int]:
    def both(rows, matrices, sizes, d_out):
        out, pull = jax.vjp(lambda r, m: way(r, m, sizes), rows, matrices)
        return out, pull(d_out)

    forward = jax.jit(way).lower(rows, matrices, sizes).compile()
    trained = jax.jit(both).lower(rows, matrices, sizes, d_out).compile()
    runs = [lambda: forward(rows, matrices, sizes), lambda: trained(rows, matrices, sizes, d_out)]
    memory = trained.memory_analysis()
    return runs, memory.temp_size_in_bytes if memory else 0


# The ways to multiply rows with the first of the matrices


def dense(rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    return rows @ matrices[0]


def batched(rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    """Of equal groups alone."""
    by_group = rows.reshape(sizes.size, -1, rows.shape[-1])
    return jnp.einsum("grk,gkn->grn", by_group, matrices[0]).reshape(rows.shape[0], -1)


def grouped(rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    return grouped_matmul(rows, matrices[0], sizes)


def ragged_dot(rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(rows, matrices[0], sizes)


def fused(rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    """The feed-forward in one operation."""
    gate, up, down = matrices
    return grouped_swiglu(rows, gate, up, down, sizes)


def feed_forward(multiply: Way, rows: jax.Array, matrices: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
    """The feed-forward by one `multiply` for each matrix."""
    gate, up, down = ((matrix,) for matrix in matrices)
    return multiply(jax.nn.silu(multiply(rows, gate, sizes)) * multiply(rows, up, sizes), down, sizes)


def matmul_costs(case: Case, dtype: jnp.dtype, repeats: int) -> dict[str, Cost]:
    """Cost of the ways to multiply."""
    ways: dict[str, Way] = {"grouped_matmul": grouped}
    if case.load == "balanced":
        ways["batched einsum"] = batched
        ways |= {"lax.ragged_dot": ragged_dot} if case.groups <= RAGGED_GROUPS else {}
    return measure(case, dense, ways, [(case.width, case.hidden)], dtype, repeats)


def swiglu_costs(case: Case, dtype: jnp.dtype, repeats: int) -> dict[str, Cost]:
    """Cost of the ways to compute the gated feed-forward."""
    ways: dict[str, Way] = {
        "grouped_swiglu": fused,
        "3 grouped_matmul": functools.partial(feed_forward, grouped),
    }
    if case.load == "balanced":
        ways["batched einsum"] = functools.partial(feed_forward, batched)
    inward, outward = (case.width, case.hidden), (case.hidden, case.width)
    return measure(case, functools.partial(feed_forward, dense), ways, [inward, inward, outward], dtype, repeats)


# Command


def add_rows(table: Table, case: Case, costs: dict[str, Cost]) -> None:
    """The dense way's milliseconds, and the times of the others over it."""
    base = costs["dense"]
    for name, cost in costs.items():
        times = [cost.forward_s / base.forward_s, cost.both_s / base.both_s]
        shown = [f"{time:.2f}" for time in times]
        if name == "dense":
            shown = [f"{cost.forward_s * 1e3:.2f} ms", f"{cost.both_s * 1e3:.2f} ms"]
        table.add_row(case.name if name == "dense" else "", name, *shown, f"{cost.temporaries / 2**20:.1f}")


def main(arguments: Sequence[str]) -> int:
    """Measures and prints one table for the matmul and one for the feed-forward."""
    made = options.options("grouped_matmul", __doc__ or "", 10)
    options.add_dtype(made)
    given = made.read(arguments)
    dtype = options.dtype_of(given)
    console = Console()
    for title, cases, costs in (("matmul", MATMULS, matmul_costs), ("feed-forward", SWIGLUS, swiglu_costs)):
        heading = f"{title} of {ROWS} rows of width {WIDTH} in {dtype}; times over the dense one"
        table = Table("groups x hidden", "way", "forward", "with backward", "MiB of temporaries", title=heading)
        with console.status("") as status:
            for case in cases:
                status.update(f"{title} {case.name}")
                add_rows(table, case, costs(case, dtype, given.repeats))
        console.print(table)
    return 0
