"""What caches and policies of diffusion decoding gain or lose.

Without a run, calls of a decoder on rows of a random model are timed with each cache and without, in turns. A cache
saves positions, and pays for gathering and for few queries that read the keys of a whole row: below its break-even
batch or length it makes decoding slower. With --workdir RUN, held-out texts are continued by every policy and cache:
wall time, calls of the model, and how likely the texts are by counts of what followed what in the training text (a
judge that is no neural network), beside the held-out texts themselves.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from adaptive.benchmarks import denoised, options
from adaptive.command import number
from adaptive.errors import RecipeError
from adaptive.inference.diffusion.caches import Cache, block, delayed, dual, greedy, none, prefix, window
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.network import Model
from adaptive.inference.diffusion.policies import confidence, random
from adaptive.objectives import Denoising
from adaptive.recipe import load
from adaptive.runs.load import find
from adaptive.runs.load import load as load_run

RECIPES = ("dlm_tiny", "block_dlm_tiny")
BATCHES, LENGTHS = (1, 4, 16), (32, 64, 128, 256, 512)
PROMPT, BLOCK, PER_CALL, CALLS = 16, 16, 2, 16


@dataclasses.dataclass(frozen=True)
class Timed:
    """Median seconds of a call, and positions that it computed of each row on average."""

    seconds: float
    positions: float


def ways(how: Denoising) -> dict[str, Cache]:
    """Caches of a model that denoises so, by name; the first is none."""
    if how.block:
        return {"none": none.Settings(), "block": block.Settings()}
    every = none, prefix, dual, delayed, greedy, window
    return {each.Settings.kind(): each.Settings() for each in every}


def plan_of(how: Denoising, cache: Cache, length: int) -> Plan:
    """What writes `length` tokens by schedule, at random where the cache needs that."""
    policy = random.Settings() if isinstance(cache, greedy.Settings) else confidence.Settings()
    return Plan(how.mask_id, length, length // PER_CALL, how.block or BLOCK, policy=policy)


def measured(networks: dict[bool, Model], how: Denoising, batch: int, length: int, repeats: int) -> dict[str, Timed]:
    """Every cache on `batch` rows of `length` tokens, most of which are written: the first `CALLS` calls are timed.

    networks  with a cache (True) and without
    """
    prompts = list(np.random.default_rng(0).integers(0, how.mask_id, (batch, PROMPT)))
    decoders = {
        name: Decoder(networks[name != "none"], plan_of(how, cache, length - PROMPT), cache)
        for name, cache in ways(how).items()
    }

    def run(decoder: Decoder) -> Timed:
        start = time.perf_counter()
        steps = list(itertools.islice(decoder.steps(prompts, jax.random.key(0)), CALLS))
        jax.block_until_ready(steps[-1].progress.tokens)
        taken = time.perf_counter() - start
        positions = float(np.mean([step.computed.mean() for step in steps]))
        return Timed(taken / len(steps), positions)

    for decoder in decoders.values():
        run(decoder)
    found = [{name: run(decoder) for name, decoder in decoders.items()} for _ in range(repeats)]
    return {
        name: Timed(float(np.median([each[name].seconds for each in found])), found[0][name].positions)
        for name in decoders
    }


Measured = dict[tuple[int, int], dict[str, Timed]]


def break_even(found: Measured, cache: str) -> list[str]:
    """In words: by batch, the least length from which on a cache was faster at all longer ones."""
    out = []
    for batch in sorted({batch for batch, _ in found}):
        lengths = sorted(length for b, length in found if b == batch)
        faster = [found[batch, n][cache].seconds < found[batch, n]["none"].seconds for n in lengths]
        last = max((i for i, wins in enumerate(faster) if not wins), default=-1)
        out.append(f"batch {batch}: {f'from {lengths[last + 1]}' if last + 1 < len(lengths) else 'nowhere'}")
    return out


def table(name: str, found: Measured) -> Table:
    """Milliseconds of a call without a cache, and how many times faster each cache is."""
    caches = [cache for cache in next(iter(found.values())) if cache != "none"]
    out = Table("batch", "length", "none, ms a call", *(f"{cache}, times faster" for cache in caches), title=name)
    for (batch, length), each in found.items():
        base = each["none"].seconds
        cells = [f"{base / each[cache].seconds:.2f} ({each[cache].positions:.0f} positions)" for cache in caches]
        out.add_row(str(batch), str(length), f"{1e3 * base:.2f}", *cells)
    return out


def main(arguments: Sequence[str]) -> int:
    """Measures and prints a table for each recipe, and where each cache begins to pay."""
    made = options.options("diffusion", __doc__ or "", 5)
    made.add_argument("--recipe", action="append", default=[], help=f"default: {' and '.join(RECIPES)}")
    made.add_argument("--longest", type=number(int, least=32), default=LENGTHS[-1], help="length of the longest rows")
    made.add_argument("--batch", type=number(int, least=1), action="append", help="default: 1, 4 and 16")
    made.add_argument("--workdir", default="", help="a run whose model continues texts in every way")
    made.add_argument("--filter", default="", metavar="FILE", help="keeps the filter that is fitted to it: --policy "
        "'learned(FILE)' of generate")  # fmt: skip
    made.add_argument("--texts", type=number(int, least=2), default=16, help="how many it continues (default 16)")
    made.add_argument("--tokens", type=number(int, least=1), default=64, help="behind each (default 64)")
    made.add_argument("--temperature", type=number(float, least=0), default=1.0, help="of all ways (default 1)")
    given = made.read(arguments)
    console = Console(width=150)
    if given.workdir:
        return continued(given, console)
    for name in given.recipe or RECIPES:
        recipe = load(name)
        how = dataclasses.replace(recipe.objective, mask_id=recipe.model.vocab_size - 1).denoising()  # type: ignore[call-arg]
        if how is None:
            raise RecipeError(f"--recipe {name}: objective={recipe.objective.kind()} fills in no hidden tokens")
        graphdef, state = nnx.split(nnx.jit(lambda model=recipe.model: model.build(jax.random.key(0)))())
        networks = {cached: Model(graphdef, state, how, cached=cached) for cached in (False, True)}
        found: Measured = {}
        with console.status("") as status:
            for batch, length in itertools.product(given.batch or BATCHES, LENGTHS):
                if length <= given.longest:
                    status.update(f"{name}: batch {batch}, length {length}")
                    found[batch, length] = measured(networks, how, batch, length, given.repeats)
        console.print(table(f"{name} on {jax.devices()[0].device_kind}", found))
        for cache in list(ways(how))[1:]:
            console.print(f"{cache} is faster than no cache in rows of a length: {'; '.join(break_even(found, cache))}")
    return 0


def continued(given: argparse.Namespace, console: Console) -> int:
    """Continues texts with a run's model in every way, and prints a table."""
    trained = load_run(find(given.workdir))
    with console.status("") as status, tempfile.TemporaryDirectory() as folder:
        bench = denoised.Bench(trained, given.texts, given.tokens, given.temperature, status.update)
        path = Path(given.filter or f"{folder}/filter.npz")
        bench.fit_filter(path)
        found = [bench.written(way) for way in denoised.ways(bench.block, str(path), cached=bench.cached)]
        if not bench.block and given.temperature:
            found.append(bench.speculated(4))
    title = f"{trained.recipe.name}, step {trained.step}: {given.texts} texts of {given.tokens} tokens at temperature "
    device = jax.devices()[0].device_kind
    console.print(denoised.table(f"{title}{given.temperature:g}, on {device}", found, bench.held_out))
    return 0
