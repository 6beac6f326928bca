"""python -m adaptive.bench train --recipe NAME [--against NAME] [group.name=value ...]: what a training step costs.
python -m adaptive.bench ema | experts | grouped_matmul | hnet | ssd: what one layer or model costs beside its baseline.

Times the compiled step on rows of random tokens and sets it beside its matmul FLOPs (`adaptive.account`) and what
a plain matmul reaches in the same process, measured between the repeats.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from adaptive import command
from adaptive.benchmarks import train_step
from adaptive.errors import UserError
from adaptive.recipe import load

OPERATIONS = ("ema", "experts", "grouped_matmul", "hnet", "ssd")  # modules of adaptive/benchmarks


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in OPERATIONS:
        return importlib.import_module(f"adaptive.benchmarks.{arguments[0]}").main(arguments[1:])
    options = parse(arguments)
    console = Console(stderr=options.json)
    for name in ("repeats", "steps_per_repeat"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: must be at least 1")
    names = [options.recipe, *([options.against] if options.against else [])]
    recipes = [load(name).with_(*options.overrides) for name in names]
    with console.status("") as status:
        measured = train_step.measure(
            recipes,
            repeats=options.repeats,
            steps_per_repeat=options.steps_per_repeat,
            devices=jax.devices(),
            progress=status.update,
        )
    if options.json:
        print(train_step.as_json(*measured))
    else:
        console.print(train_step.table(*measured))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adaptive.bench", description="Measure what a recipe costs.")
    parser.add_argument("what", choices=["train", *OPERATIONS], help="train: one training step")
    parser.add_argument("overrides", nargs="*", metavar="group.name=value", help="settings, for both recipes")
    parser.add_argument("--recipe", required=True, help="name, or a saved recipe.json")
    parser.add_argument("--against", help="a second recipe, run in turns with the first")
    parser.add_argument("--repeats", type=int, default=10, help="how often each is measured (default 10)")
    parser.add_argument("--steps_per_repeat", type=int, default=3, help="steps timed together (default 3)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(command.start(main))
