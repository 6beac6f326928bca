"""Block-sparse attention by how many key blocks a query block visits, against causal attention over all keys.

A query block visits its own key block and random earlier ones. All ways of a case run in turns, so that what slows the
machine slows each; of every way the fastest run counts. Bytes of temporaries are those of forward and backward pass.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options, timing
from kernels_pallas.attention import attention
from kernels_pallas.block_sparse_attention import BlockTable, block_sparse_attention, from_map

LENGTHS = (1024, 4096)
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 128
SLOTS = (1, 2, 4, 8, 16, 32)
ALL_KEYS = "all keys, dense"

Arrays = tuple[jax.Array, ...]
Way = Callable[..., jax.Array]  # (q, k, v) -> result


@dataclasses.dataclass(frozen=True)
class Cost(timing.Cost):
    """share: of the tiles of the causal triangle."""

    share: float


def random_table(seq: int, slots: int) -> BlockTable:
    """A list for every query block of `seq` positions, for all rows and heads."""
    blocks = -(-seq // BLOCK)
    scores = np.random.default_rng(0).random((1, 1, blocks, blocks), np.float32)
    scores[..., np.arange(blocks), np.arange(blocks)] = 2
    return from_map(jnp.tril(jnp.ones((1, 1, blocks, blocks), bool)), slots, jnp.asarray(scores))[0]


def ways(seq: int) -> dict[str, tuple[float, Way]]:
    """The ways to compute it, by name, and their shares of the tiles; over all keys twice, the dense one last."""
    blocks = -(-seq // BLOCK)
    triangle = blocks * (blocks + 1) / 2
    made: dict[str, tuple[float, Way]] = {}
    for slots in (*(slots for slots in SLOTS if slots < blocks), blocks):
        table = random_table(seq, slots)

        def listed(q: jax.Array, k: jax.Array, v: jax.Array, table: BlockTable = table) -> jax.Array:
            return block_sparse_attention(q, k, v, *table, query_block=BLOCK, key_block=BLOCK)

        made["all blocks" if slots == blocks else f"{slots} of {blocks} blocks"] = (
            int(table.counts.sum()) / triangle,
            listed,
        )
    made[ALL_KEYS] = 1.0, lambda q, k, v: attention(q, k, v, q_index=None, k_index=None)
    return made


def measure(seq: int, dtype: jnp.dtype, repeats: int) -> dict[str, Cost]:
    """Cost of each way on random inputs, one row of `seq` positions."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    draw = lambda heads: jax.random.normal(next(keys), (1, seq, heads, DIM), dtype)  # noqa: E731
    inputs, d_out = (draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)), draw(HEADS)
    made = ways(seq)
    programs = {name: timing.programs(way, inputs, d_out) for name, (_, way) in made.items()}
    least = timing.fastest({name: runs for name, (runs, _) in programs.items()}, repeats, timing.second_run)
    return {name: Cost(least[name][0], least[name][1], bytes_, made[name][0]) for name, (_, bytes_) in programs.items()}


# Command


def add_rows(table: Table, case: str, costs: dict[str, Cost]) -> None:
    """Milliseconds of each way, and its times over those of dense attention."""
    base = costs[ALL_KEYS]
    for name, cost in costs.items():
        over = f"{cost.forward_s / base.forward_s:.2f}", f"{cost.both_s / base.both_s:.2f}"
        shown = f"{cost.forward_s * 1e3:.2f} ms", over[0], f"{cost.both_s * 1e3:.2f} ms", over[1]
        table.add_row(case, name, f"{cost.share:.0%}", *shown, f"{cost.temporaries / 2**20:.1f}")
        case = ""


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table."""
    made = options.options("block_sparse_attention", __doc__ or "", 5)
    options.add_dtype(made)
    given = made.read(arguments)
    dtype = options.dtype_of(given)
    console = Console()
    title = f"block-sparse attention in {dtype}, {HEADS} heads of {DIM} over {KV_HEADS}, blocks of {BLOCK}"
    columns = "positions", "way", "tiles", "forward", "over dense", "with backward", "over dense", "MiB of temporaries"
    table = Table(*columns, title=title)
    with console.status("") as status:
        for seq in LENGTHS:
            status.update(str(seq))
            add_rows(table, str(seq), measure(seq, dtype, given.repeats))
    console.print(table)
    return 0
