"""What serving a recursion one pass at a time gives: its engine beside the ceiling that its own launches set, beside
the same model where every token takes every pass, and beside a plain transformer of as many layers.

Weights are random: what a token costs is its number of passes, and these are replayed from a table, so that speed does
not depend on what is generated. All ways run in turns in one process. The ceiling is one over the seconds of a token in
full launches (a turn, and a pass as often as tokens take one on average): nothing waits, no launch has an empty row.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from adaptive.account import account
from adaptive.benchmarks import options
from adaptive.benchmarks.peers import machine
from adaptive.command import number
from adaptive.errors import UserError
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine import Engine
from adaptive.inference.engine.passes import Picked
from adaptive.inference.engine.slots import asked_of
from adaptive.inference.requests import Request
from adaptive.layers import block, stack
from adaptive.layers.feed_forwards import dense
from adaptive.layers.mixers import attention
from adaptive.models import language_model
from adaptive.models.bodies import plain, recursive

PROMPT = 8  # tokens of a prompt
ROWS = 3  # rows of an engine for each of a launch: then two launches can be in flight whose rows are known
GREEDY = Drawing(temperature=0)


@dataclasses.dataclass(frozen=True)
class Way:
    """An engine, and the mean depth of its tokens (None: all layers at once)."""

    name: str
    engine: Engine
    rows: int
    depth: float | None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a way reached.

    rate       tokens per second in the middle of a run in which every row has a request from the first to the last
    ideal      seconds of a token in full launches; NaN of engines without passes
    occupancy  rows that launches computed, over those that they could
    first, between  seconds to a request's first token, and between its tokens, where requests come one after another
    """

    name: str
    mean_depth: float | None
    rate: float
    occupancy: float
    ideal: float = math.nan
    first: tuple[float, ...] = ()
    between: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        return self.rate * self.ideal


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, or with --json a line of JSON."""
    made = options.options("engine", __doc__ or "", 3, "rounds, of which the best counts")
    add = made.add_argument
    add("--width", type=number(int, least=64), default=512, help="of the stream (default 512)")
    add("--layers", type=number(int, least=3), default=14, help="of the plain transformer, unrolled (default 14)")
    add("--recursions", type=number(int, least=2), default=3, help="passes at most (default 3)")
    add("--batch", type=number(int, least=1), default=8, help="rows of a launch (default 8)")
    add("--tokens", type=number(int, least=8), default=32, help="of each request (default 32)")
    add("--vocab", type=number(int, least=2), default=1024, help="tokens (default 1024)")
    add("--own", type=shares, default=None, metavar="S1,S2,...",
        help="shares of tokens that a trained model gives one pass, two, ... (default: none measured)")  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON instead of the tables")
    given = made.read(arguments)
    if (given.layers - 2) % given.recursions:
        fits = ", ".join(str(2 + given.recursions * n) for n in (2, 4, 6, 8))
        raise UserError(f"--layers {given.layers}: the first, the last and {given.recursions} equal passes: {fits}")
    if given.own is not None and len(given.own) != given.recursions:
        raise UserError(f"--own has {len(given.own)} shares for {given.recursions} passes")
    console = Console(stderr=given.json)
    with console.status("") as status:
        report = measured(given, status.update)
    if given.json:
        print(json.dumps(report))
    else:
        wide = Console(width=max(console.width, 120))
        for table in tables(report):
            wide.print(table)
        wide.print(", ".join(f"{name} {value}" for name, value in report["about"].items()))
    return 0


def shares(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 0 or not sum(values):
        raise argparse.ArgumentTypeError(f"{text!r}: shares, such as 0.5,0.3,0.2")
    return tuple(value / sum(values) for value in values)


def models(given: argparse.Namespace) -> tuple[language_model.Settings, language_model.Settings]:
    """(a plain transformer, one whose layers but the first and last are passes of shared ones)."""
    heads, hidden = max(1, given.width // 64), 16 * round(given.width / 6)
    own = block.Settings(attention.Settings(heads=heads, head_dim=64), dense.Settings(hidden=hidden))
    one = stack.Settings((own,))
    core = stack.Settings((own,), repeats=(given.layers - 2) // given.recursions)
    whole = plain.Settings(stack.Settings((own,), repeats=given.layers))
    looped = recursive.Settings(prelude=one, core=core, coda=one, recursions=given.recursions)
    of = lambda body: language_model.Settings(vocab_size=given.vocab, width=given.width, body=body)  # noqa: E731
    return of(whole), of(looped)


def distributions(given: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Shares of tokens by the number of passes that they take."""
    n = given.recursions
    halves = [0.5**r for r in range(n)]
    found = {"all passes": (*(0.0,) * (n - 1), 1.0), "geometric": tuple(h / sum(halves) for h in halves)}
    return found if given.own is None else found | {"as trained": given.own}


def replayed(share: Sequence[float], length: int = 4096) -> np.ndarray:
    """i32[length] depths that have these shares, in an order by chance that is always the same."""
    counts = np.floor(np.array(share) * length).astype(int)
    counts[int(np.argmax(share))] += length - counts.sum()
    depths = np.repeat(np.arange(1, len(share) + 1), counts).astype(np.int32)
    return np.random.default_rng(0).permutation(depths)


def measured(given: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    vanilla, looped = models(given)
    length = PROMPT + given.tokens
    parts = {name: nnx.split(settings.build(jax.random.key(0))) for name, settings in
             (("vanilla", vanilla), ("looped", looped))}  # fmt: skip
    progress("launches: compiling")
    launches = Launches(*parts["looped"], given)
    flops = launch_flops(looped, given)
    ways = list(ways_of(given, parts, length))
    best: dict[str, Found] = {}
    try:
        for way in ways:
            progress(f"{way.name}: compiling")
            way.engine.warm(likeliest=False)
        for repeat in range(given.repeats):
            progress(f"launches, {repeat + 1} of {given.repeats}")
            launches.measure()
            for way in ways:
                progress(f"{way.name}, {repeat + 1} of {given.repeats}")
                found = decoded(way, given, tokens=given.tokens)
                if way.name not in best or found.rate > best[way.name].rate:
                    best[way.name] = found
        costs = launches.seconds()
        for way in ways:
            if way.name.startswith("engine") and way.depth is not None:
                ideal = (costs["turn"] + way.depth * costs["pass"]) / given.batch
                best[way.name] = dataclasses.replace(best[way.name], ideal=ideal)
            progress(f"{way.name}: latency")
            first, between = latencies(way, given, best[way.name].rate)
            best[way.name] = dataclasses.replace(best[way.name], first=first, between=between)
        alone = {way.name: alone_rate(way, given) for way in ways}
        cache = {way.name: way.engine.figures()["cache_bytes_per_token"] for way in ways}
    finally:
        for way in ways:
            way.engine.close(finish=False)
    matmul, copy = machine()
    return {
        "about": about(given, vanilla, matmul, copy),
        "launches": costs,
        "ways": [dataclasses.asdict(f) | {"share": f.share} for f in best.values()],
        "cache_bytes_per_token": cache,
        "alone": [
            {"name": name, "rate": rate, "floor": floor_rate(given, vanilla, looped, name, best[name].mean_depth, copy)}
            for name, rate in alone.items()
        ],
        "saved": saved(given, looped, flops, best),
    }


def ways_of(given: argparse.Namespace, parts: dict[str, Any], length: int) -> Iterator[Way]:
    shape: dict[str, Any] = {"length": length, "piece": 16, "queue": 4096}
    batch, n = given.batch, given.recursions
    yield Way("vanilla", Engine(*parts["vanilla"], rows=batch, **shape), batch, None)
    yield Way("vanilla, twice the rows", Engine(*parts["vanilla"], rows=2 * batch, **shape), 2 * batch, None)
    whole = Engine(*parts["looped"], rows=batch, stepwise=False, **shape)
    yield Way("recursion, all passes at once", whole, batch, float(n))
    for name, share in distributions(given).items():
        replay = replayed(share)
        mean = float(replay.mean())
        engine = Engine(*parts["looped"], rows=ROWS * batch, batch=batch, replay=replay, **shape)
        yield Way(f"engine, {name}", engine, ROWS * batch, mean)


class Launches:
    """Seconds of a full turn and of a full pass, launched one after another without waiting: from cycles of one and of
    all passes between turns."""

    def __init__(self, graphdef: Any, state: Any, given: argparse.Namespace):
        self.given = given
        self.least = {1: math.inf, given.recursions: math.inf}
        self._cycles = {depth: self._cycle(graphdef, state, depth) for depth in self.least}
        for run in self._cycles.values():
            run(2)

    def measure(self) -> None:
        turns = max(2, (self.given.tokens - 6) // (self.given.repeats + 1))
        for depth, run in self._cycles.items():
            self.least[depth] = min(self.least[depth], run(turns))

    def seconds(self) -> dict[str, float]:
        short, long = self.least.values()
        once = (long - short) / (self.given.recursions - 1)
        return {"pass": once, "turn": short - once}

    def _cycle(self, graphdef: Any, state: Any, depth: int) -> Callable[[int], float]:
        batch = self.given.batch
        programs = programs_of(graphdef, state, self.given, np.array([depth], np.int32))
        slots, keep = programs.empty(), np.ones(programs.rows, bool)
        tokens, valid = np.zeros(16, np.int32), np.arange(16) < PROMPT
        asked = asked_of(Request(tokens[:1], 10**6, GREEDY), 0)
        for row in range(batch):
            slots, _ = programs.read(
                slots, row, tokens, valid, first=True, last=True, asked=asked, given=None, most=0
            )  # fmt: skip

        def run(turns: int) -> float:
            nonlocal slots
            begin = time.perf_counter()
            for _ in range(turns):
                for _ in range(depth):
                    slots, _ = programs.once(slots, keep, batch)
                slots, told = programs.turn(slots, keep, None, batch, 0)
            jax.block_until_ready(told)
            return (time.perf_counter() - begin) / turns

        return run


def programs_of(graphdef: Any, state: Any, given: argparse.Namespace, replay: np.ndarray) -> Picked:
    room = PROMPT + given.tokens + 16
    return Picked(
        graphdef, state, batch=given.batch, replay=replay, rows=ROWS * given.batch, room=room, vocab=None
    )  # fmt: skip


def launch_flops(looped: language_model.Settings, given: argparse.Namespace) -> dict[str, float]:
    """FLOPs of a full turn and of a full pass as the compiler counts them, with layers written out: of a loop it counts
    one round."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: looped.build(jax.random.key(0), unroll=True)))
    programs = programs_of(graphdef, shapes, given, np.ones(1, np.int32))
    slots, keep = jax.eval_shape(programs.empty), jax.ShapeDtypeStruct((programs.rows,), bool)
    lowered = {
        "pass": programs.once_lowered(slots, keep, given.batch),
        "turn": programs.turn_lowered(slots, keep, given.batch),
    }
    return {name: float((one.compile().cost_analysis() or {})["flops"]) for name, one in lowered.items()}


def requests(way: Way, count: int, tokens: int) -> list[Request]:
    return [Request(np.full(PROMPT, 1 + i % 7, np.int32), tokens, GREEDY, seed=97 * i) for i in range(count)]


def decoded(way: Way, given: argparse.Namespace, tokens: int) -> Found:
    """A request in every row from the beginning: tokens per second between the first and the last quarter of them."""
    before = way.engine.figures()
    tickets = [way.engine.submit(request) for request in requests(way, way.rows, tokens)]
    total = way.rows * tokens
    marks: list[tuple[float, float]] = []
    while len(marks) < 2:
        done = way.engine.figures()["tokens"] - before["tokens"]
        if done >= total * (0.25, 0.75)[len(marks)]:
            marks.append((time.perf_counter(), done))
        time.sleep(0.002)
    for ticket in tickets:
        for _ in ticket:
            pass
    after = way.engine.figures()
    (t0, n0), (t1, n1) = marks
    difference = {name: after[name] - before[name] for name in ("rows_computed", "rows_launched")}
    occupancy = difference["rows_computed"] / max(1.0, difference["rows_launched"])
    return Found(way.name, way.depth, (n1 - n0) / (t1 - t0), occupancy)


def latencies(way: Way, given: argparse.Namespace, rate: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(p50, p99) seconds to the first token and between tokens, of requests that come by chance at 0.7 of the rate."""
    count, rng = way.rows, np.random.default_rng(1)
    gaps = rng.exponential(given.tokens / (0.7 * rate), count)
    tickets = []
    for request, gap in zip(requests(way, count, given.tokens), gaps, strict=True):
        time.sleep(gap)
        tickets.append(way.engine.submit(request))
    for ticket in tickets:
        for _ in ticket:
            pass
    first = [ticket.times[0] - ticket.begin for ticket in tickets]
    between = np.concatenate([np.diff(ticket.times) for ticket in tickets])
    both = lambda values: tuple(float(np.percentile(values, p)) for p in (50, 99))  # noqa: E731
    return both(first), both(between)


def alone_rate(way: Way, given: argparse.Namespace) -> float:
    """Tokens per second of one request alone, the first and the last few left out; the median of three."""
    found = []
    for request in requests(way, 3, given.tokens):
        ticket = way.engine.submit(request)
        for _ in ticket:
            pass
        own = ticket.times[2:-1]
        found.append((len(own) - 1) / (own[-1] - own[0]))
    return statistics.median(found)


def floor_rate(
    given: argparse.Namespace, vanilla: Any, looped: Any, name: str, depth: float | None, copy: float
) -> float:
    """Tokens per second of one row were its parameters and cache read at the speed of a copy, and all else free."""
    own = vanilla.body.stack.blocks[0]
    layer = 4 * sum(own.sizes(given.width))
    layers = given.layers if depth is None else 2 + depth * looped.body.core.layers
    kept = 4 * 2 * given.width * (PROMPT + given.tokens / 2)
    return copy / (layers * (layer + kept) + 4 * given.vocab * given.width)


def saved(
    given: argparse.Namespace, looped: Any, flops: dict[str, float], best: dict[str, Found]
) -> list[dict[str, Any]]:
    """Shares that early exits save: of the account's FLOPs, of the compiler's, of the time of launches, of time."""
    full = best["engine, all passes"]
    n, seq = given.recursions, PROMPT + given.tokens

    def counted(depth: float) -> float:
        shares = [max(0.0, min(1.0, depth - r)) for r in range(n)]
        return account(looped, seq, [seq * s for s in shares]).forward_flops_per_token

    def of_launches(depth: float) -> float:
        return flops["turn"] + depth * flops["pass"]

    found = []
    for name, own in best.items():
        if name.startswith("engine") and own is not full:
            assert own.mean_depth is not None
            found.append({
                "name": name,
                "account": 1 - counted(own.mean_depth) / counted(n),
                "compiler": 1 - of_launches(own.mean_depth) / of_launches(n),
                "launches": 1 - own.ideal / full.ideal,
                "time": 1 - full.rate / own.rate,
            })  # fmt: skip
    return found


def about(given: argparse.Namespace, vanilla: Any, matmul: float, copy: float) -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "layers": f"{given.layers} or 2 + {given.recursions} x {(given.layers - 2) // given.recursions}",
        "width": str(given.width),
        "vocab": str(given.vocab),
        "rows of a launch": str(given.batch),
        "tokens": f"{given.tokens} after {PROMPT}",
        "matmul": f"{matmul / 1e9:.0f} GFLOP/s",
        "copy": f"{copy / 1e9:.1f} GB/s",
    }


def tables(report: dict[str, Any]) -> Iterator[Table]:
    ms = lambda pair: " / ".join(f"{1e3 * s:.0f}" for s in pair)  # noqa: E731
    base = report["ways"][0]["rate"]
    table = Table("way", "mean depth", "tokens/s", "over vanilla", "of the ceiling", "occupancy", "first, ms p50 / p99",
                  "between, ms p50 / p99", "cache B/token")  # fmt: skip
    for way in report["ways"]:
        depth = "" if way["mean_depth"] is None else f"{way['mean_depth']:.2f}"
        share = "" if math.isnan(way["share"]) else f"{way['share']:.1%}"
        table.add_row(
            way["name"], depth, f"{way['rate']:.0f}", f"{way['rate'] / base:.2f}", share, f"{way['occupancy']:.1%}",
            ms(way["first"]), ms(way["between"]), f"{report['cache_bytes_per_token'][way['name']]:.0f}",
        )  # fmt: skip
    yield table
    table = Table("early exits save", "FLOPs, account", "FLOPs, compiler", "time of launches", "time")
    for own in report["saved"]:
        table.add_row(own["name"], *(f"{own[key]:.1%}" for key in ("account", "compiler", "launches", "time")))
    yield table
    table = Table("one row", "tokens/s", "bandwidth floor", "of it")
    for own in report["alone"]:
        table.add_row(own["name"], f"{own['rate']:.0f}", f"{own['floor']:.0f}", f"{own['rate'] / own['floor']:.1%}")
    yield table
