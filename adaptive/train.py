"""python -m adaptive.train --recipe NAME [--workdir DIR] [setting=value ...]: trains a model.

    --recipe NAME     a recipe of recipes/, a Python file of your own, or the recipe.json of an earlier run
    --workdir DIR     where everything is kept; a run that is there already goes on (default: a new folder in runs/)
    --list_recipes    names all recipes and ends
    --print_recipe    prints the recipe, fully resolved, and ends
    --dry_run         does everything up to and including compilation, prints the plan and ends

Settings are dotted: train.steps=100 model.body.depth=token_choice. `data=embedded` sets all that a preset of data sets.
Exit codes: 0 done, 1 failed, 2 something asked for cannot work, 3 not finite, 75 stopped when asked and saved,
124 a step or a save exceeded its time limit, 130 interrupted.
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from adaptive import command, doctor
from adaptive.errors import UserError
from adaptive.parallel import cluster
from adaptive.recipe import Recipe, describe, list_recipes, load

FLAGS = flags.FlagValues()
flags.DEFINE_string("recipe", "", "name of a recipe, or path of a .py or a recipe.json", flag_values=FLAGS)
flags.DEFINE_string("workdir", "", "folder of the run (default: a new one in runs/)", flag_values=FLAGS)
flags.DEFINE_bool("list_recipes", False, "name all recipes", flag_values=FLAGS)
flags.DEFINE_bool("print_recipe", False, "print the resolved recipe", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "stop before the first step", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    overrides = command.parse_with_settings(FLAGS, arguments)
    if FLAGS.help:
        print(__doc__)
        return 0
    if FLAGS.list_recipes:
        print("\n".join(f"{name:24} {load(name).description}" for name in list_recipes()))
        return 0
    if not FLAGS.recipe:
        raise UserError(f"which recipe? --recipe NAME, one of: {', '.join(list_recipes())}")
    recipe = load(FLAGS.recipe).with_(*overrides)
    if FLAGS.print_recipe:
        print(describe(recipe, load(FLAGS.recipe) if FLAGS.recipe.endswith(".py") else None))
        return 0
    recipe.validate()
    print(doctor.check_versions())
    cluster.make_room_for_emulated_devices()
    cluster.join()
    return train(recipe, Path(FLAGS.workdir) if FLAGS.workdir else new_workdir(recipe.name), dry=FLAGS.dry_run)


def train(recipe: Recipe, workdir: Path, *, dry: bool = False) -> int:
    """Trains `recipe` in `workdir` from the beginning, or from its newest checkpoint; the exit code."""
    import jax

    from adaptive.data.huggingface import HubError
    from adaptive.data.pipeline import open_data
    from adaptive.parallel.mesh import make_mesh
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.platform import keep_compilations
    from adaptive.training import plan as plans
    from adaptive.training.program import Program, Steps, data_shard
    from adaptive.training.stopping import StopRequest
    from adaptive.training.watchdog import COMPILE_S, Watchdog

    primary = jax.process_index() == 0
    say = print_now if primary else lambda text: None
    with contextlib.ExitStack() as at_exit:
        compilations = keep_compilations()
        mesh = make_mesh(recipe.mesh)
        program = Program(recipe, mesh)
        show_data_progress(say)
        try:
            data = open_data(
                recipe.data,
                batch_size=recipe.train.batch_size,
                vocab_size=recipe.model.vocab_size,
                shard=data_shard(mesh),
            )
        except HubError as error:
            raise UserError(f"{error}\n{elsewhere(recipe)}") from None
        # Claimed only now, so that a run that cannot work leaves no folder behind.
        folder = None if dry else at_exit.enter_context(RunFolder.open(workdir, recipe, primary=primary, say=say))
        plan = plans.make_plan(program, data.tokenizer.token_byte_lengths(), data.validation_passage(4096))
        for line in [
            f"recipe    {recipe.name}",
            *plans.plan_lines(plan, program),
            *map("data      {}".format, data.describe()),
        ]:
            say(line)

        watchdog, stop = Watchdog(), at_exit.enter_context(StopRequest(say))
        say(f"compiling the train step (kept in {compilations})")
        with watchdog.limit("compiling", COMPILE_S):
            steps = Steps(program)
        plan = plans.with_compiled(plan, steps.first)
        say(f"compiled  in {steps.first.seconds:.1f} s")
        say(plans.memory_line(plan.memory))
        if folder is None:
            say("dry run: stopping before the first step")
            return 0

        from adaptive.training.loop import Loop

        loop = Loop(program, steps, data, plan, folder, watchdog, stop, say)
        return loop.run()


def new_workdir(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    taken = {path.name for path in Path("runs").glob(f"{name}-*")}
    return Path("runs") / next(f"{name}-{n}" for n in range(1, len(taken) + 2) if f"{name}-{n}" not in taken)


def elsewhere(recipe: Recipe) -> str:
    """How to run the same recipe without the hub: the command as given, with other data."""
    given = [text for text in sys.argv[1:] if not text.startswith("data=")]
    again = ["python", "-m", "adaptive.train", *(given or ["--recipe", recipe.name])]
    files = ["data=embedded", "data.source=files", "data.paths=TEXT_FILE_OR_FOLDER"]
    return (
        "the same recipe on a local file, or on the text that comes with the package:\n"
        f"  {shlex.join([*again, *files])}\n"
        f"  {shlex.join([*again, 'data=embedded'])}"
    )


def show_data_progress(say: Callable[[str], None]) -> None:
    """Lines of adaptive.data on what takes long (tokenising a corpus for the first time)."""
    handler = logging.Handler()
    handler.emit = lambda record: say(f"data      {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("adaptive.data")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def print_now(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(cluster.leave(command.start(main)))
