"""What an H-Net costs: its training step beside its FLOPs and beside the same blocks without chunking, and decoding.

Training: the compute account's paid FLOPs, capacities and all, against time. `overhead` is the ratio of times over the
ratio of FLOPs, 1 where chunking itself is free. Decoding: single bytes of several rows whose chunks begin at random, by
how many rows the network inside computes together (`rows` of `HNet.decode_step`). All ways of a case run in turns, so
that what slows the machine slows each.

Measured on one core of a busy machine (AMD EPYC), in float32 with jax 0.10.2. A training step on 4 rows of 512 bytes,
beside the same blocks without chunking:

| recipe           | FLOPs | time  | overhead |
| ---------------- | ----- | ----- | -------- |
| hnet_tiny        | 0.549 | 0.552 | 1.005    |
| hnet_2stage_tiny | 0.526 | 0.530 | 1.008    |

Bytes decoded per second, all rows together:

| recipe, batch        | rows 0 | rows 1 | rows 2 | rows 4 | rows 8 |
| -------------------- | ------ | ------ | ------ | ------ | ------ |
| hnet_tiny, 1         | 1,351  | 2,955  |        |        |        |
| hnet_tiny, 4         | 2,114  | 3,418  | 3,060  |        |        |
| hnet_tiny, 16        | 2,369  | 3,436  | 3,802  | 3,654  | 2,826  |
| hnet_2stage_tiny, 1  | 955    | 3,664  |        |        |        |
| hnet_2stage_tiny, 4  | 1,331  | 4,418  | 3,529  |        |        |
| hnet_2stage_tiny, 16 | 2,245  | 5,294  | 5,030  | 4,315  | 3,574  |
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import options, train_step
from adaptive.layers.chunkers import none, words
from adaptive.models import language_model
from adaptive.models.bodies import Body, hnet
from adaptive.recipe import Recipe, load
from adaptive.routing.types import Output

RECIPES = ("hnet_tiny", "hnet_2stage_tiny")
SEQ, BATCH = 512, 4
PROMPT, BYTES = 64, 64  # of decoding: what was read before, and what is timed
BATCHES = (1, 4, 16)
ROWS = (0, 1, 2, 4, 8)


def training_pair(name: str) -> tuple[Recipe, Recipe]:
    """A recipe, and the same blocks at the same widths where every position is a chunk."""
    chunked = load(name).with_(
        f"data.seq_len={SEQ}", f"train.batch_size={BATCH}", "mesh.data=1"
    )  # fmt: skip
    body = unchunked(chunked.model.body)
    return chunked, dataclasses.replace(
        chunked, model=dataclasses.replace(chunked.model, body=body), name=f"{name}-not-chunked"
    )


def unchunked(body: Body) -> Body:
    """The same stages, every position a chunk."""
    if not isinstance(body, hnet.Settings):
        return body
    inner = unchunked(body.inner)
    return dataclasses.replace(body, chunker=none.Settings(), capacities=(), capacity_steps=(), inner=inner)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Seconds per byte of all rows together, median, by `rows`."""

    batch: int
    seconds: dict[int, float]


def decoding(model: language_model.Settings, batch: int, repeats: int) -> Decoding:
    """Every way of grouping `batch` rows, chunks of the first stage at one byte in its target, at random."""
    body = model.body
    assert isinstance(body, hnet.Settings)
    given = dataclasses.replace(model, body=dataclasses.replace(body, chunker=words.Settings()))
    graphdef, state = nnx.split(given.build(jax.random.key(0)))
    rng = np.random.default_rng(0)
    begins = jnp.asarray(rng.random((batch, PROMPT + BYTES)) < 1 / body.chunker.expected())
    prompt = jnp.asarray(rng.integers(0, model.vocab_size, (batch, PROMPT)), jnp.int32)

    @jax.jit
    def prefilled(state: Any) -> tuple[jax.Array, Any]:
        network = nnx.merge(graphdef, state)
        out, cache = network.prefill(prompt, network.init_cache(batch, PROMPT + BYTES), boundaries=begins[:, :PROMPT])
        return likeliest(out), cache

    @functools.partial(jax.jit, static_argnames="rows")
    def written(state: Any, token: jax.Array, cache: Any, *, rows: int) -> jax.Array:
        network = nnx.merge(graphdef, state)

        def step(carry: Any, begin: jax.Array) -> tuple[Any, jax.Array]:
            out, cache = network.decode_step(carry[0], carry[1], boundaries=begin, rows=rows)
            return (likeliest(out), cache), carry[0]

        return jax.lax.scan(step, (token, cache), begins[:, PROMPT:].T)[1]

    start = prefilled(state)
    ways: dict[int, Callable[[], jax.Array]] = {}
    ways |= {rows: functools.partial(written, state, *start, rows=rows) for rows in ROWS if rows < max(batch, 2)}
    times = in_turns(ways, repeats)
    return Decoding(batch, {rows: statistics.median(each) / (BYTES * batch) for rows, each in times.items()})


def likeliest(out: Output) -> jax.Array:
    """i32[batch]: the byte that each row's last logits favour."""
    assert out.logits is not None
    return out.logits[:, -1].argmax(-1).astype(jnp.int32)


def in_turns(ways: dict[int, Callable[[], jax.Array]], repeats: int) -> dict[int, list[float]]:
    """Seconds of `repeats` runs of every way, one after another."""
    for run in ways.values():
        jax.block_until_ready(run())
    times: dict[int, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def show_decoding(name: str, found: Sequence[Decoding]) -> Table:
    """Bytes per second by batch and rows."""
    table = Table("batch", *(f"rows {rows}" for rows in ROWS), title=f"{name}: bytes/s of all rows, by rows together")
    for each in found:
        cells = [f"{1 / each.seconds[rows]:,.0f}" if rows in each.seconds else "" for rows in ROWS]
        table.add_row(str(each.batch), *cells)
    return table


# Command


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table of training and one of decoding for each recipe."""
    made = options.options("hnet", __doc__ or "", 7, "how often each is measured")
    made.add_argument("--only", choices=["training", "decoding"], help="one part alone")
    given = made.read(arguments)
    console = Console(width=130)
    devices = jax.devices()[:1]
    for name in RECIPES:
        if given.only != "decoding":
            pair = training_pair(name)
            console.print(
                train_step.table(*train_step.measure(pair, repeats=given.repeats, steps_per_repeat=2, devices=devices))
            )
        if given.only != "training":
            config = load(name).model.at_step(-1)
            console.print(show_decoding(name, [decoding(config, batch, given.repeats) for batch in BATCHES]))
    return 0
