"""Compiles the whole train step of a recipe for accelerators that are not here:

    adaptive bench aot --recipe NAME [--recipe NAME ...] --target v5e|v5p|v6e|v7x|h200 [setting=value ...]

What the compiler tells is proven: that it compiles, the memory of each device, collectives, kernels, the largest
temporaries. The utilisation is estimated (`adaptive.benchmarks.estimate`): nothing is run.

Unless settings say otherwise, parameters are split over all devices (mesh.fsdp), layers compute in bfloat16, and every
device has the rows that the recipe gives one (train.device_batch_size, else train.batch_size). XLA_FLAGS hold for the
compiler.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive import command, targets
from adaptive.benchmarks import traffic
from adaptive.benchmarks.estimate import PARTS, RATES, estimate
from adaptive.command import number
from adaptive.errors import UserError
from adaptive.recipe import Recipe, load
from adaptive.targets import Topology
from adaptive.training.program import accumulation_of

GIB = 2**30
_RAISED = re.compile(r"[\w.]*(Error|Exception|Failure): ")
EFFORT = -1.0  # of the compiler: four times faster than its own, memory within 3 %
ABORTS = ("v7x",)  # whose compiler fails at little effort


@dataclasses.dataclass(frozen=True)
class Step:
    """One train step to compile: a recipe as it is compiled, for devices of a target."""

    source: str
    recipe: Recipe
    settings: tuple[str, ...]
    topology: Topology

    @property
    def target(self) -> str:
        return self.topology.target

    @property
    def devices(self) -> int:
        return self.topology.devices

    @property
    def kernels(self) -> str:
        return self.recipe.train.kernels

    @property
    def rows(self) -> int:
        """Of a device."""
        return self.recipe.train.batch_size // self.devices


def steps(names: Sequence[str], given: argparse.Namespace) -> Iterator[Step]:
    """The steps that a command line asks for. Raises UserError for recipes and settings that are invalid."""
    both = ("auto", "reference") if given.against_reference else (given.kernels,)
    for name in names:
        published = load(name)
        rows = published.train.device_batch_size or published.train.batch_size
        named = {setting.partition("=")[0] for setting in given.settings}
        defaults = {
            "mesh.fsdp": given.devices,
            "train.batch_size": rows * given.devices,
            "train.compute_dtype": "bfloat16",
        }
        for kernels in both:
            made = {**defaults, "train.kernels": kernels}
            settings = (*(f"{at}={value}" for at, value in made.items() if at not in named), *given.settings)
            recipe = published.with_(*settings)
            recipe.validate()
            accumulation_of(recipe, given.devices // recipe.mesh.tensor)
            yield Step(name, recipe, settings, Topology(given.target, given.devices))


def compiled(step: Step, effort: float, save: str = "") -> dict[str, Any]:
    """What the compiler tells of a step, beside what it was told. Raises UserError where it cannot be asked.

    save  folder that the compiled steps are kept in; empty: they are not
    """
    order = {
        "recipe": step.source,
        "settings": step.settings,
        "topology": dataclasses.asdict(step.topology),
        "effort": effort,
        "save": save,
    }
    run = [sys.executable, "-m", "adaptive.benchmarks.aot_program", json.dumps(order)]
    env = targets.environment(step.devices if step.target == "cpu" else 0)
    if step.target != "cpu" and "XLA_FLAGS" in os.environ:
        env["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    if done.returncode:
        if done.returncode == UserError.code:
            raise UserError(done.stderr.strip().splitlines()[-1])
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        why = next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])
        raise UserError(
            f"compiling {step.recipe.name} for {step.target} ended with code {done.returncode}: {why[:400]}"
        )
    return record(step, effort, json.loads(done.stdout.splitlines()[-1]))


def record(step: Step, effort: float, facts: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a compiled step, as JSON; facts say which `remat` was chosen where it was to be."""
    remat = facts.get("remat", step.recipe.train.remat)
    train = dataclasses.replace(step.recipe.train, remat=remat)
    recipe = dataclasses.replace(step.recipe, train=train)
    return {
        "recipe": step.recipe.name,
        "target": step.target,
        "devices": step.devices,
        "kernels": step.kernels,
        "settings": list(step.settings),
        "rows": step.rows,
        "seq_len": step.recipe.data.seq_len,
        "remat": remat,
        "effort": effort,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
        "device_memory": None if step.target == "cpu" else targets.TARGETS[step.target].memory,
        **facts,
        "estimated": None if step.target == "cpu" else estimated(recipe, step.topology, facts),
    }


def estimated(recipe: Recipe, topology: Topology, facts: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step and of its parts, and the utilisation, without communication, which is told beside them where
    the compiler told what there is."""
    guess = estimate(recipe, topology.target, topology.devices)
    found = {**dataclasses.asdict(guess), "step": guess.step}
    if "received" in facts:
        moved = sum((traffic.Received(**one) for one in facts["received"].values()), start=traffic.Received())
        found["communication"] = moved.seconds(targets.TARGETS[topology.target])
    return found


def versions() -> dict[str, str]:
    """Of what compiles."""
    found: dict[str, str] = {}
    for package in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin"):
        for folder in (sys.path, [str(targets.COMPILERS)]):
            for one in importlib.metadata.distributions(name=package, path=folder):
                found.setdefault(package, one.version)
    return found


# Tables


def table(records: Sequence[dict[str, Any]]) -> Table:
    """A column per compiled step."""
    out = Table("", *(f"{r['recipe']}, {r['devices']} x {r['target']}, {r['kernels']}" for r in records))
    for name, cell in ROWS:
        out.add_row(name, *map(cell, records))
    return out


def _gib(value: float | None) -> str:
    return "not told" if value is None else f"{value / GIB:.2f}"


def fits(r: dict[str, Any]) -> str:
    """Whether a device holds the step, in words."""
    room = f"of {r['device_memory'] / GIB:.2f} GiB"
    return f"fits: {_gib(r['needs'])} {room}" if r["fits"] else f"does not fit: {_gib(r['needs'])} {room}"


def _told(cell: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda r: cell(r) if "temporaries" in r else "-"


def _counts(name: str) -> Callable[[dict[str, Any]], str]:
    def cell(r: dict[str, Any]) -> str:
        lines = (f"{kind}: {n['runs']:,} ({n['number']} in the text), {n['bytes'] / 2**20:,.0f} MiB"
                 for kind, n in r[name].items())  # fmt: skip
        return "\n".join(lines) or "none"

    return cell


def _largest(r: dict[str, Any]) -> str:
    return "\n".join(f"{one['array']}: {one['bytes'] / 2**20:,.0f} MiB, {one['number']}" for one in r["largest"])


def _square(r: dict[str, Any]) -> str:
    return f"{r['square']['array']}: {r['square']['bytes'] / 2**20:,.0f} MiB" if r["square"] else "none"


def _estimated(r: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {_ms(r['estimated'][part])}" for part in PARTS if r["estimated"][part])
    return f"{_ms(r['estimated']['step'])} ms\n({parts})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.2g}"


ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("rows x positions of a device", lambda r: f"{r['rows']} x {r['seq_len']:,}"),
    ("train.remat", lambda r: r["remat"]),
    ("memory of a device", fits),
    ("arguments, GiB", _told(lambda r: _gib(r["arguments"]))),
    ("temporaries, GiB", _told(lambda r: _gib(r["temporaries"]))),
    ("peak, GiB", _told(lambda r: _gib(r["peak"]))),
    ("collectives", _told(_counts("collectives"))),
    ("kernels (custom calls)", _told(_counts("custom_calls"))),
    ("largest temporaries", _told(_largest)),
    ("largest positions x positions", _told(_square)),
    ("compilation, s", _told(lambda r: f"{r['compile_s']:.0f}")),
    ("estimated step", _estimated),
    ("estimated MFU", lambda r: f"{r['estimated']['utilisation']:.0%}"),
)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Two tables for documents, a row per compiled step: memory and the estimate; what the program holds."""
    ordered = sorted(records, key=lambda r: (r["target"], r["recipe"], r["remat"] != "none", r["remat"], r["kernels"]))
    tables = []
    for columns in (MEMORY, CONTENT):
        lines = ["| " + " | ".join(name for name, _ in columns) + " |", "| --- " * len(columns) + "|"]
        shown = [r for r in ordered if columns is MEMORY or "temporaries" in r]
        tables.append("\n".join([*lines, *("| " + " | ".join(cell(r) for _, cell in columns) + " |" for r in shown)]))
    return "\n\n".join(tables)


def _calls(r: dict[str, Any]) -> str:
    found = r["custom_calls"].values()
    return f"{sum(n['number'] for n in found)}, run {sum(n['runs'] for n in found):,} times" if found else "none"


def _moved(r: dict[str, Any]) -> str:
    return "; ".join(f"{kind} {n['runs']:,}, {n['bytes'] / 2**20:,.0f}" for kind, n in r["collectives"].items())


_NAMED: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("recipe", lambda r: f"`{r['recipe']}`"),
    ("for", lambda r: f"{r['devices']} x {r['target']}"),
    ("`train.remat`", lambda r: r["remat"]),
    ("kernels", lambda r: r["kernels"]),
)
MEMORY = (
    *_NAMED,
    ("rows of a device", lambda r: f"{r['rows']} x {r['seq_len']:,}"),
    ("arguments", _told(lambda r: _gib(r["arguments"]))),
    ("temporaries", _told(lambda r: _gib(r["temporaries"]))),
    ("peak", _told(lambda r: _gib(r["peak"]))),
    ("fits", lambda r: "yes" if r["fits"] else f"**no**: {_gib(r['needs'])}"),
    ("positions x positions", _told(_square)),
    ("estimated step", lambda r: f"{_ms(r['estimated']['step'])} ms"),
    ("estimated MFU", lambda r: f"{r['estimated']['utilisation']:.0%}"),
)
CONTENT = (
    *_NAMED,
    ("kernels: calls", _calls),
    ("collectives: how often, MiB", _moved),
    ("largest temporary", lambda r: _largest({"largest": r["largest"][:1]}).rpartition(",")[0]),
    ("compilation, s", lambda r: f"{r['compile_s']:.0f}"),
)


# Command


def main(arguments: Sequence[str]) -> int:
    """Compiles and prints a table; or prints what was kept of earlier times."""
    given = parse(arguments)
    console = Console(stderr=given.json)
    if given.kept:
        found = read(given.kept)
        print("\n".join(map(json.dumps, found)) if given.json else markdown(found))
        return 0
    todo = list(steps(given.recipe, given))
    targets.refuse_without_compiler(given.target)
    effort = 0.0 if given.full_effort or given.target in ABORTS else EFFORT
    found = []
    with console.status("") as status:
        for step in todo:
            status.update(f"compiling {step.recipe.name} for {step.devices} x {step.target}, {step.kernels}")
            found.append(compiled(step, effort))
            if given.keep:
                keep(given.keep, found[-1])
    if given.json:
        for one in found:
            print(json.dumps(one))
    else:
        console.print(table(found))
        console.print(f"estimated: {RATES[given.target].source}; nothing was run")
    return 0


def keep(folder: str, one: dict[str, Any]) -> None:
    """Writes a record as a file of its own."""
    name = f"{one['target']}-{one['recipe']}-{one['rows']}-{one['remat']}-{one['kernels']}.json"
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(one, indent=1) + "\n", encoding="utf-8")


def read(folder: str) -> list[dict[str, Any]]:
    """The records of a folder, in the order of their names. Raises UserError where there are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    if not found:
        raise UserError(f"--kept: no .json file in {folder}")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = command.Options("bench aot", __doc__ or "")
    options.add_argument("--recipe", action="append", help="name or path, as often as wanted (default mor_360m)")
    options.add_argument("--target", choices=list(targets.TARGETS), default="v5e", help="kind of device (default v5e)")
    options.add_argument("--devices", type=number(int, least=1, most=8), default=8, help="how many (default 8)")
    options.add_argument("--kernels", choices=["auto", "reference"], default="auto", help="reference: none")
    options.add_argument("--against_reference", action="store_true", help="both, side by side")
    options.add_argument("--full_effort", action="store_true", help="of the compiler, as in a run; four times slower")
    options.add_argument("--keep", metavar="FOLDER", help="write a JSON file for each step into it")
    options.add_argument("--kept", metavar="FOLDER", help="compile nothing; print such files as a Markdown table")
    options.add_argument("--json", action="store_true", help="print a line of JSON for each step")
    options.add_settings()
    given = options.read(arguments)
    given.recipe = given.recipe or ["mor_360m"]
    return given
