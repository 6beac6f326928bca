"""What a training step of a recipe costs, on rows of random tokens.

The compiled step is timed and set beside its matmul FLOPs (`adaptive.account`) and what a plain matmul reaches in the
same process, measured between the repeats.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from adaptive.account import account
from adaptive.data.batch import Batch
from adaptive.parallel.mesh import make_mesh
from adaptive.peaks import peak_of
from adaptive.recipe import Recipe
from adaptive.training.fitting import fitted
from adaptive.training.program import Program

MATMUL_SIDE = {"cpu": 2048}  # of the square matmul that stands for the machine's peak, by platform
ACCELERATOR_SIDE = 8192


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least, and the 10th and 90th percentile of a set of measurements."""

    median: float
    least: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        p10, p90 = np.percentile(values, [10, 90])
        return Spread(statistics.median(values), min(values), float(p10), float(p90))

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        return f"{self.median * scale:.{digits}f} ({self.p10 * scale:.{digits}f} to {self.p90 * scale:.{digits}f})"


@dataclasses.dataclass(frozen=True)
class Result:
    """One recipe's step, over all devices.

    step_s               seconds per step, over the repeats
    compile_s            seconds to trace and compile it
    tokens               per step
    flops                matmul FLOPs per step as executed
    useful_flops         the same with attention over causal pairs alone and nothing recomputed
    flops_per_s          executed, at the median step
    share_of_matmul      of the best matmul measured in the same run
    utilisation          useful FLOP/s over the data sheet's peak; None where no peak is on record
    device_bytes         what the compiled step needs on each device: state, arguments, temporaries
    """

    recipe: str
    step_s: Spread
    compile_s: float
    tokens: int
    flops: float
    useful_flops: float
    tokens_per_s: float
    flops_per_s: float
    share_of_matmul: float
    utilisation: float | None
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The recipe against another: time of a step, executed FLOPs, and `overhead`, the first over the second.

    time  ratio within each pair of neighbouring repeats: what slows the machine slows both
    """

    time: Spread
    flops: float
    overhead: float


class TimedStep:
    """A recipe's training step, compiled, with a state and a batch of random tokens to run it on."""

    def __init__(self, recipe: Recipe, devices: Sequence[jax.Device]):
        """Raises UserError for a recipe that is invalid or does not fit the devices."""
        recipe.validate()
        self.recipe = recipe
        program = Program(recipe, make_mesh(recipe.mesh, devices))
        self.program = fitted(program).program if recipe.train.remat == "auto" else program
        self.compiled = self.program.compile_train_step()
        self._state = self.program.fresh_state()
        self._batch = self.program.for_training(random_batch(recipe))
        self.seconds(1)  # the first run touches memory for the first time

    def seconds(self, steps: int) -> float:
        """Seconds per step over `steps` steps, dispatched one after another and awaited at the end."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self.compiled.call(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / steps


def measure(
    recipes: Sequence[Recipe],
    *,
    repeats: int,
    steps_per_repeat: int,
    devices: Sequence[jax.Device],
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Result], list[Comparison], Spread]:
    """Results of each recipe, the first recipe compared with each other one, and the matmul's FLOP/s on all devices.

    In each repeat every recipe runs in turn, and the matmul. Raises UserError as `TimedStep` does.
    """
    steps = []
    for recipe in recipes:
        progress(f"compiling {recipe.name}")
        steps.append(TimedStep(recipe, devices))
    matmul = matmul_timer(devices[0], steps[0].program.dtype)
    times: list[list[float]] = [[] for _ in steps]
    rates: list[float] = []
    for repeat in range(repeats):
        progress(f"repeat {repeat + 1} of {repeats}")
        for each, step in zip(times, steps, strict=True):
            each.append(step.seconds(steps_per_repeat))
        rates.append(matmul() * len(devices))
    peak = Spread.of(rates)
    results = [_result(step, each, max(rates), devices) for step, each in zip(steps, times, strict=True)]
    pairs = zip(results[1:], times[1:], strict=True)
    return results, [_comparison(results[0], times[0], *other) for other in pairs], peak


def _result(step: TimedStep, times: Sequence[float], matmul: float, devices: Sequence[jax.Device]) -> Result:
    recipe, spread = step.recipe, Spread.of(times)
    rows, seq = recipe.train.batch_size, recipe.data.seq_len
    cost = account(recipe.model, seq)
    flops, useful = rows * cost.train_flops(step.program.remat), rows * seq * cost.train_flops_per_token
    peak = peak_of(devices[0].device_kind, str(step.program.dtype)).flops
    return Result(
        recipe=recipe.name,
        step_s=spread,
        compile_s=step.compiled.seconds,
        tokens=rows * seq,
        flops=flops,
        useful_flops=useful,
        tokens_per_s=rows * seq / spread.median,
        flops_per_s=flops / spread.median,
        share_of_matmul=flops / spread.median / matmul,
        utilisation=useful / spread.median / (peak * len(devices)) if peak else None,
        device_bytes=sum(step.compiled.memory().values()),
    )


def _comparison(a: Result, times: Sequence[float], b: Result, other_times: Sequence[float]) -> Comparison:
    ratio = Spread.of([mine / other for mine, other in zip(times, other_times, strict=True)])
    flops = a.flops / b.flops
    return Comparison(time=ratio, flops=flops, overhead=ratio.median / flops)


def matmul_timer(device: jax.Device, dtype: jnp.dtype) -> Callable[[], float]:
    """A function that multiplies two square matrices of `dtype` on one device and returns the FLOP/s it reached."""
    side = MATMUL_SIDE.get(device.platform, ACCELERATOR_SIDE)
    a = jax.device_put(jnp.full((side, side), 1 / side, dtype), device)
    run = jax.jit(lambda a: a @ a)
    run(a).block_until_ready()

    def once() -> float:
        start = time.perf_counter()
        run(a).block_until_ready()
        return 2 * side**3 / (time.perf_counter() - start)

    return once


def random_batch(recipe: Recipe) -> Batch:
    """Rows of uniformly random tokens, one document each, every target counted.

    Where the data has boundaries, every fifth token is one.
    """
    rows, seq = recipe.train.batch_size, recipe.data.seq_len
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, (rows, seq + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq))
    ones = np.ones((rows, seq), np.int32)
    boundaries = None if recipe.data.boundaries == "none" else positions % 5 == 0
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32), boundaries)


def table(results: Sequence[Result], comparisons: Sequence[Comparison], matmul: Spread) -> Table:
    """What was measured, a column per recipe; medians, in brackets the 10th and 90th percentile."""
    out = Table("", *(r.recipe for r in results))
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("tokens/s", lambda r: f"{r.tokens_per_s:,.0f}"),
        ("step, ms", lambda r: r.step_s.show(1e3)),
        ("fastest step, ms", lambda r: f"{r.step_s.least * 1e3:.1f}"),
        ("compilation, s", lambda r: f"{r.compile_s:.1f}"),
        ("executed GFLOP per step", lambda r: f"{r.flops / 1e9:.2f}"),
        ("executed GFLOP/s", lambda r: f"{r.flops_per_s / 1e9:.1f}"),
        ("share of the best matmul", lambda r: f"{r.share_of_matmul:.1%}"),
        ("MFU (data sheet)", lambda r: "no peak on record" if r.utilisation is None else f"{r.utilisation:.1%}"),
        ("memory of the step, MiB", lambda r: f"{r.device_bytes / 2**20:,.0f}"),
    ]
    for name, cell in rows:
        out.add_row(name, *map(cell, results))
    for name, value in (
        ("time over it", lambda c: c.time.show(digits=3)),
        ("executed FLOPs over it", lambda c: f"{c.flops:.3f}"),
        ("overhead: time over FLOPs", lambda c: f"{c.overhead:.3f}"),
    ):
        if comparisons:
            out.add_row(f"{results[0].recipe}'s {name}", "", *map(value, comparisons))
    out.add_row("matmul alone, GFLOP/s", matmul.show(1e-9))
    return out


def as_json(results: Sequence[Result], comparisons: Sequence[Comparison], matmul: Spread) -> str:
    """The same on one line, with the machine and versions."""
    device = jax.devices()[0]
    record: dict[str, Any] = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "results": [dataclasses.asdict(r) for r in results],
        "comparisons": [dataclasses.asdict(c) for c in comparisons],
        "matmul_flops_per_s": dataclasses.asdict(matmul),
    }
    return json.dumps(record)
