"""What a training step costs, or one layer or model beside its baseline:

    adaptive bench train --recipe NAME [--against NAME] [setting=value ...]
    adaptive bench aot --recipe NAME --target v5e|v5p|v6e|v7x|h200 [setting=value ...]
    adaptive bench kernels | tune | peers
    adaptive bench data
    adaptive bench block_sparse_attention | diffusion | ema | engine | experts | grouped_matmul | hnet | ssd

Times the compiled step on rows of random tokens and sets it beside its matmul FLOPs (`adaptive.account`) and what
a plain matmul reaches in the same process, measured between the repeats. `aot` runs nothing: it compiles for machines
that are not here. `data` measures reading. `kernels` is one table of all operations, `tune` finds sizes of blocks.
`peers` needs torch and transformers.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.bench"))

import argparse
import importlib
from collections.abc import Sequence

import jax
from rich.console import Console

from adaptive import command
from adaptive.benchmarks import train_step
from adaptive.command import number
from adaptive.errors import RecipeError
from adaptive.recipe import Recipe, load
from adaptive.runs.platform import start_backend

# Modules of adaptive/benchmarks.
OPERATIONS = (
    "aot",
    "block_sparse_attention",
    "data",
    "diffusion",
    "ema",
    "engine",
    "experts",
    "grouped_matmul",
    "hnet",
    "kernels",
    "peers",
    "ssd",
    "tune",
)


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    start_backend()
    if arguments and arguments[0] in OPERATIONS:
        return importlib.import_module(f"adaptive.benchmarks.{arguments[0]}").main(arguments[1:])
    options = parse(arguments)
    console = Console(stderr=options.json)
    names = [options.recipe, *([options.against] if options.against else [])]
    recipes = [settings_of(name, options.settings, others=len(names) > 1) for name in names]
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


def settings_of(name: str, settings: Sequence[str], *, others: bool) -> Recipe:
    """A recipe with settings that are given to others as well. Raises RecipeError where it cannot have one, with the
    way out."""
    recipe = load(name)
    try:
        return recipe.with_(*settings)
    except RecipeError as error:
        if not others:
            raise
        why = "settings are given to both recipes; one that only one of them has belongs into a recipe file of its own"
        raise RecipeError(f"{name}: {error}\n{why}") from None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = command.Options("bench", __doc__ or "")
    options.add_argument("what", choices=["train", *OPERATIONS], help="train: one training step")
    options.add_argument("--recipe", required=True, help="name, or path of a .py or .json file")
    options.add_argument("--against", help="a second recipe, with the same settings, in turns with the first")
    options.add_argument(
        "--repeats", type=number(int, least=1), default=10, help="how often each is measured (default 10)"
    )
    together = "steps timed together (default 3)"
    options.add_argument("--steps_per_repeat", type=number(int, least=1), default=3, help=together)
    options.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options.add_settings()
    return options.read(arguments)
