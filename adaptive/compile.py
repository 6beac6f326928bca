"""Compiles the train step of a recipe for machines that are not here: whether it fits, and what it would take.

    adaptive compile --recipe NAME --topology v5e-256 [setting=value ...]
    adaptive compile --recipe NAME --topology v5p-128x2 --sweep
    adaptive compile --topology list

The very step that `adaptive train` would run, with its kernels, by XLA's own compilers on this CPU. What they tell is
proven: the memory of a device, collectives, kernels. Times are an estimate, with its assumptions; nothing runs.

Where no mesh.* is given, parameters are split over as many devices of a slice or node as divide their widths
(mesh.fsdp), and mesh.data takes the rest. The batch is the recipe's. Layers compute in bfloat16, as on accelerators.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.compile"))

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptive import command, targets
from adaptive.benchmarks import aot
from adaptive.benchmarks.moves import moves
from adaptive.benchmarks.pods import lines, markdown, read
from adaptive.command import number
from adaptive.errors import UserError
from adaptive.parallel.mesh import axis_sizes
from adaptive.parallel.rules import AxisRules
from adaptive.paths import local_path
from adaptive.recipe import Recipe, load
from adaptive.settings import divisors
from adaptive.targets import Topology
from adaptive.training.program import accumulation_of

TRIES = 6  # of a sweep, compilations at most


def options() -> command.Options:
    made = command.Options("compile", __doc__ or "")
    made.add_argument("--recipe", default="", help="name of a recipe, or path of a .py or .json file")
    made.add_argument(
        "--topology", default="", help="v5e-256, v5p-128, v6e-256x2, h200-64, cpu-8, ...; list: names all"
    )
    made.add_argument(
        "--slices", type=number(int, least=1), help="so many of that topology, joined by a slower network"
    )
    made.add_argument("--sweep", action="store_true", help="find train.remat and train.device_batch_size that fit")
    made.add_argument("--full_effort", action="store_true", help="of the compiler, as in a run; four times slower")
    made.add_argument("--save", default="", metavar="FOLDER", help="keep the compiled step for train --compiled FOLDER")
    made.add_argument("--kept", default="", metavar="FOLDER", help="compile nothing; print its JSON files as tables")
    made.add_argument("--json", default="", metavar="FILE", help="write all that is known as JSON; -: print it")
    made.add_settings()
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    given = options().read(arguments)
    if given.topology == "list":
        print("\n".join(targets.topology_lines()))
        return 0
    if given.kept:
        print(markdown(read(local_path(given.kept, "--kept"))))
        return 0
    if not given.topology:
        raise UserError("for what? --topology v5e-256 for example; --topology list names all")
    topology = targets.topology(given.topology, given.slices)
    if not given.recipe:
        raise UserError("which recipe? --recipe NAME; adaptive train --list_recipes names all")
    step = step_of(given.recipe, given.settings, topology)
    targets.refuse_without_compiler(topology.target)
    if given.save:
        local_path(given.save, "--save")
    if given.sweep and (topology.target == "cpu" or given.save):
        why = "one step is kept" if given.save else "how much memory a CPU has is not known"
        raise UserError(f"--sweep: {why}; leave it out")
    console = Console(stderr=True)
    with console.status("") as status:
        tried = [compiled(step, given, status)]
        if given.sweep:
            tried += swept(step, given, tried[0], status)
    best = fastest(tried)
    if given.json:
        write_json(given.json, tried if given.sweep else tried[0])
    if given.json != "-":
        print("\n".join(lines(best or tried[0], recipe_of(step, best or tried[0]), topology)))
        if given.sweep:
            print("\n".join(table(tried, best)))
    return 0


def step_of(name: str, settings: Sequence[str], topology: Topology) -> aot.Step:
    """The step that a command line asks for. Raises UserError for a recipe that is invalid or does not divide over the
    topology."""
    published = load(name)
    made = {} if topology.target == "cpu" else {"train.compute_dtype": "bfloat16"}
    if topology.slices > 1:
        made["mesh.slices"] = str(topology.slices)
    if not any(text.startswith("mesh.") and not text.startswith("mesh.slices=") for text in settings):
        made["mesh.fsdp"] = str(default_fsdp(published.with_(*settings), topology))
    named = {text.partition("=")[0] for text in settings}
    settings = (*(f"{at}={value}" for at, value in made.items() if at not in named), *settings)
    recipe = published.with_(*settings)
    recipe.validate()
    sizes = axis_sizes(recipe.mesh, topology.devices)
    accumulation_of(recipe, math.prod(sizes[axis] for axis in AxisRules().batch))
    return aot.Step(name, recipe, settings, topology)


def default_fsdp(recipe: Recipe, topology: Topology) -> int:
    """The most devices of one slice or node that divide every width of a model."""
    widths = (recipe.model.width, *recipe.model.body.widths(recipe.model.width))
    return max(n for n in divisors(topology.devices // topology.slices) if all(width % n == 0 for width in widths))


def compiled(step: aot.Step, given: argparse.Namespace, status: Any) -> dict[str, Any]:
    train = step.recipe.train
    status.update(f"compiling {step.recipe.name} for {step.topology}, remat {train.remat}")
    # What is kept to be run is compiled as a run does.
    full = given.full_effort or given.save or step.target in aot.ABORTS
    record = aot.compiled(step, 0.0 if full else aot.EFFORT, str(Path(given.save).absolute()) if given.save else "")
    mesh_given = any(text.startswith("mesh.") for text in given.settings)
    return {**record, "topology": step.topology.name, "slices": step.topology.slices, "mesh_given": mesh_given}


def recipe_of(step: aot.Step, record: dict[str, Any]) -> Recipe:
    """The recipe of a record: of a sweep, other settings than the step's."""
    return load(step.source).with_(*record["settings"])


def swept(step: aot.Step, given: argparse.Namespace, first: dict[str, Any], status: Any) -> list[dict[str, Any]]:
    """Compiles what should be faster than the step or fit where it does not, the fastest by estimate first, until one
    fits."""
    room, tried = targets.TARGETS[step.target].memory, list[dict[str, Any]]()
    for move in moves(first, step.recipe, step.topology):
        faster = not first["fits"] or move.seconds < _seconds(first)
        if not faster or move.needs > 1.25 * room or len(tried) == TRIES:
            continue
        names = {text.partition("=")[0] for text in move.settings}
        kept = [text for text in step.settings if text.partition("=")[0] not in names]
        tried.append(compiled(step_of(step.source, (*kept, *move.settings), step.topology), given, status))
        if tried[-1]["fits"]:
            break
    return tried


def fastest(tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of those that fit the one with the shortest step; None where none fits."""
    fitting = [record for record in tried if record["fits"]]
    known = [record for record in fitting if record["estimated"]]
    return min(known, key=_seconds, default=fitting[0] if fitting else None)


def _seconds(record: dict[str, Any]) -> float:
    return record["estimated"]["step"] + record["estimated"]["communication"]


def table(tried: Sequence[dict[str, Any]], best: dict[str, Any] | None) -> list[str]:
    """What a sweep compiled."""
    found = ["", "swept      remat      rows at once   needs GiB   step, nothing hidden"]
    for one in tried:
        rows = one["rows"] // one["accumulation"]
        needs = "not told" if one["needs"] is None else f"{one['needs'] / 2**30:.2f}"
        took = f"{_seconds(one) * 1e3:,.0f} ms" if one["fits"] else "does not fit"
        mark = "  <- recommended" if one is best else ""
        found.append(f"           {one['remat']:10} {rows:>12}   {needs:>9}   {took}{mark}")
    return found


def write_json(where: str, found: Any) -> None:
    """Raises UserError where the file cannot be written."""
    text = json.dumps(found, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
        return
    path = local_path(where, "--json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written: {error.strerror or error}") from None
