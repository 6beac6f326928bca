"""Trains a model: adaptive train --recipe NAME [--workdir DIR] [setting=value ...]

Settings are dotted: train.steps=100 model.body.depth=token_choice. `data=embedded` sets all that a preset of data sets.
Exit codes: 0 done, 1 failed, 2 something asked for cannot work, 3 not finite, 4 a step that was computed
twice gave different numbers, 75 stopped when asked and saved,
76 another process of the job was lost, 124 a step or a save exceeded its time limit, 130 interrupted, 141 nobody reads
the output any more.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.train", stopped=75))

import contextlib
import logging
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adaptive import command, versions
from adaptive.errors import UserError
from adaptive.parallel import cluster
from adaptive.paths import local_path
from adaptive.recipe import Recipe, describe, filed_of, list_recipes, load
from adaptive.runs.claim import claim
from adaptive.runs.mirror import place_of


def options() -> command.Options:
    made = command.Options("train", __doc__ or "")
    made.add_argument("--recipe", default="", help="name of a recipe, or path of a .py or .json file")
    where = "where all is kept; a run that is there goes on (default: a new folder in runs/)"
    made.add_argument("--workdir", default="", help=where)
    begin = "RUN[@STEP]: begin a new run with the weights of another, of its newest checkpoint or that of STEP"
    made.add_argument("--init_from", default="", help=begin)
    kept = "folder of `adaptive compile --save`: its step is loaded where it is for this run, instead of compiled"
    made.add_argument("--compiled", default="", help=kept)
    made.add_argument("--list_recipes", action="store_true", help="name all recipes and end")
    made.add_argument("--print_recipe", action="store_true", help="print the recipe, fully resolved, and end")
    made.add_argument("--dry_run", action="store_true", help="do all up to and including compilation, and end")
    made.add_settings()
    return made


def main(arguments: Sequence[str]) -> int:
    with stopped_early():
        return cluster.leave(command.exit_code(run, arguments))


@contextlib.contextmanager
def stopped_early() -> Iterator[None]:
    """SIGTERM before training begins, which hears signals itself, unwinds what was begun and ends with 75."""

    def stop(number: int, frame: object) -> NoReturn:
        cluster.stopped()
        raise SystemExit(cluster.PREEMPTED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(arguments: Sequence[str]) -> int:
    given = options().read(arguments)
    if given.list_recipes:
        print("\n".join(f"{name:24} {load(name).description}" for name in list_recipes()))
        return 0
    if not given.recipe:
        raise UserError(f"which recipe? --recipe NAME, one of: {', '.join(list_recipes())}")
    recipe = load(given.recipe).with_(*given.settings)
    workdir = place_of(given.workdir, "--workdir") if given.workdir else None
    if given.init_from:
        from adaptive.runs.initial import settings_of

        recipe = recipe.with_(*settings_of(given.init_from, workdir))
    if given.print_recipe:
        print(describe(recipe, filed_of(given.recipe)))
        return 0
    from adaptive.runs.platform import start_backend

    recipe.validate()
    print(versions.check_versions())
    cluster.make_room_for_emulated_devices()
    cluster.join()
    start_backend()
    compiled = local_path(given.compiled, "--compiled") if given.compiled else None
    if given.dry_run:
        return train(recipe, None, arguments, compiled)
    with contextlib.nullcontext(workdir) if workdir else new_workdir(recipe.name) as folder:
        return train(recipe, folder, arguments, compiled)


def train(
    recipe: Recipe, workdir: Path | None, arguments: Sequence[str] = (), compiled: Path | None = None
) -> int:  # fmt: skip
    """Trains `recipe` in `workdir` from the beginning, or from its newest checkpoint; the exit code.

    workdir    None: nothing is kept, and all stops before the first step
    arguments  of the command, for advice; with some, all the time of this process is counted as the run's
    compiled   folder of steps that `adaptive compile --save` made
    """
    import jax

    from adaptive.parallel.mesh import make_mesh
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.mask_token import check_mask, with_mask
    from adaptive.runs.origin import record_start
    from adaptive.runs.platform import keep_compilations
    from adaptive.runs.shared import check_shared
    from adaptive.training import plan as plans
    from adaptive.training import sets_and_tasks
    from adaptive.training.fitting import fitted
    from adaptive.training.goodput import Account, process_began
    from adaptive.training.program import Program, data_shard
    from adaptive.training.saved import saved_steps
    from adaptive.training.stopping import StopRequest
    from adaptive.training.waiting import waiting
    from adaptive.training.watchdog import Watchdog

    account = Account(process_began() if arguments else None)
    primary = jax.process_index() == 0
    say = print_now if primary else lambda text: None
    with contextlib.ExitStack() as at_exit:
        compilations = keep_compilations()
        recipe = with_mask(recipe)
        mesh = make_mesh(recipe.mesh)
        program = Program(recipe, mesh)
        saved, why_not = saved_steps(compiled, program) if compiled else (None, "")
        show_data_progress(say)
        data = open_data(recipe, data_shard(mesh), arguments, say if workdir is None else None)
        if data:
            check_mask(recipe, data.tokenizer)
            sets_and_tasks.opened(recipe, data.tokenizer)
        # Claimed only now, so that a run that cannot work leaves no folder behind.
        opened = RunFolder.open(workdir, recipe, primary=primary, say=say) if workdir else None
        folder = at_exit.enter_context(opened) if opened else None
        if folder:
            if primary:
                record_start(folder.path)
            cluster.meet("the workdir is open")
            check_shared(folder.place)
        text = (data.tokenizer.token_byte_lengths(), data.validation_passage(4096)) if data else None
        plan = plans.make_plan(program, text)
        about = map("data      {}".format, data.describe()) if data else []
        for line in [f"recipe    {recipe.name}", *plans.plan_lines(plan, program), *about]:
            say(line)

        watchdog, stop = Watchdog(), at_exit.enter_context(StopRequest(say))
        if why_not:
            say(f"compiled  anew, not taken from {compiled}: {why_not}")
        say(f"compiling the train step ({compilations})")
        shown = waiting("compiling", say) if primary else contextlib.nullcontext()
        limit, at_once = recipe.train.start_timeout_s, stop.at_once(folder.close if folder else lambda: None)
        alone = cluster.one_compiles("compiling the train step")
        with watchdog.limit("compiling", limit), at_once, shown, account.of("compile"), alone:
            fit = fitted(program, saved)
        cluster.meet("the train step is compiled")
        program, steps = fit.program, fit.steps
        plan = plans.with_compiled(plan, fit)
        origin = f", from {compiled}" if saved else ", from the cache" if steps.first.kept else ""
        say(f"{'loaded   ' if saved else 'compiled '} in {steps.first.seconds:.1f} s{origin}")
        if fit.why:
            say(f"remat     {fit.why}")
        say(plans.memory_line(plan.memory))
        if folder is None:
            say("dry run: stopping before the first step")
            return 0

        from adaptive.training.loop import Loop

        loop = Loop(program, steps, data, plan, folder, watchdog, stop, account, say)
        return loop.run()


@contextlib.contextmanager
def new_workdir(name: str) -> Iterator[Path]:
    """A new folder runs/NAME-1, runs/NAME-2, ..., which no other command gets; removed again if nothing comes into it.

    In a job of several processes the first one makes it, and all get its name. Raises CheckpointError where it cannot
    be made.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    number = claim(Path("runs"), name) if jax.process_index() == 0 else 0
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    workdir = Path("runs") / f"{name}-{number}"
    try:
        yield workdir
    finally:
        with contextlib.suppress(OSError):  # a run is in it, or another process was faster
            workdir.rmdir()


def open_data(
    recipe: Recipe, shard: tuple[int, int], arguments: Sequence[str], say: Callable[[str], None] | None
) -> Any:
    """The recipe's data; where the hub is out of reach, a UserError with commands that do without, or None where it can
    be done without, which is told with `say`."""
    from adaptive.data import pipeline
    from adaptive.data.huggingface import HubError

    size, vocab = recipe.train.batch_size, recipe.model.vocab_size
    try:
        return pipeline.open_data(recipe.data, batch_size=size, vocab_size=vocab, shard=shard)
    except HubError as error:
        if say is not None:
            say(f"data      not looked at: {error}")
            return None
        raise UserError(f"{error}\n{elsewhere(recipe, arguments)}") from None


def elsewhere(recipe: Recipe, arguments: Sequence[str]) -> str:
    """How to run the same recipe without the hub: the command as given, with other data."""
    given = [text for text in arguments if not text.startswith("data=")]
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
    """A line; on a terminal it is broken between words, indented as what follows the first word of such lines is."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
    print(text, flush=True)
