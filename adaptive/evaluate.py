"""Evaluates a checkpoint: adaptive evaluate --checkpoint RUN [--data SET...] [--depths 1,2,3]

Losses with intervals on the run's held-out text, or on sets of yours: corpora of the package, files, folders, token
stores. The numbers are printed and kept in RUN/evaluations, where the report finds them.
Exit codes: 0 done, 2 something asked for cannot work, 130 interrupted.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.evaluate"))

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from adaptive import command
from adaptive.command import number
from adaptive.errors import UserError
from adaptive.paths import local_path


def options() -> command.Options:
    made = command.Options("evaluate", __doc__ or "")
    add = made.add_argument
    add("--checkpoint", default="", metavar="RUN",
        help="folder of the run, whose newest checkpoint is read, or RUN/checkpoints/STEP")  # fmt: skip
    add("--step", type=number(int, least=0), help="the checkpoint of this step instead")
    add("--ema", action="store_true", help="the running average of the parameters, of a run with train.ema above 0")
    add("--data", nargs="+", default=[], metavar="SET",
        help="what to score: validation (the default: what the run holds out), english, python, chinese or dna (of "
        "which every 20th document), or all of a file, folder, glob or token store; NAME=PATH names it")  # fmt: skip
    add("--text_key", default="", help="field of JSON and parquet rows with the text (default: as the run has it)")
    add("--stride", type=number(int, least=1), default=0,
        help="tokens from one row to the next: a smaller one than the row gives every token more before it, and takes "
        "longer (default: the row)")  # fmt: skip
    add("--rows", type=number(int, least=0), default=0,
        help="score so many rows of each set, evenly spaced over it (default 0: all)")  # fmt: skip
    add("--draws", type=number(int, least=0, most=10_000), default=0,
        help="of what is hidden, for models of diffusion, whose loss is a bound (default 8)")  # fmt: skip
    add("--depths", type=_numbers, default=(), metavar="N,N,...",
        help="also the loss at these numbers of passes through a recursive model's shared block")  # fmt: skip
    add("--caches", nargs="+", default=[], metavar="POLICY",
        help="also the loss of generation, token by token, with these policies of a recursion's cache: active_only, "
        "last, cycle(2), shared")  # fmt: skip
    add("--tasks", nargs="+", default=[], metavar="FILE",
        help="what to answer: .jsonl files, folders of them, or a CORE bundle; text is scored with --data")  # fmt: skip
    add("--harness", nargs="+", default=[], metavar="TASK",
        help="tasks of lm-evaluation-harness by name; needs pip install 'adaptive-lm[lm_eval]'")  # fmt: skip
    add("--harness_tasks", default="", metavar="FOLDER",
        help="of the harness's task files (.yaml); its tasks alone are known then, and nothing is fetched")  # fmt: skip
    add("--shots", type=number(int, least=0), help="examples before each item (default: as a bundle says, else none)")
    add("--seeds", type=_numbers, default=(1234, 2345, 3456), metavar="N,N,...",
        help="of the draws of examples, over which results are averaged (default 1234,2345,3456)")  # fmt: skip
    add("--items", type=number(int, least=0), default=0, help="answer so many items of each task (default 0: all)")
    add("--compare", nargs="+", default=[], metavar="RUN",
        help="computes nothing: the newest evaluation of each run, or that of --name, in one table")  # fmt: skip
    add("--resamples", type=number(int, least=2, most=100_000), default=1000, help="of the bootstrap (default 1000)")
    add("--name", default="", help="of the result, RUN/evaluations/NAME.json (default: step-STEP)")
    add("words", nargs="*", help=argparse.SUPPRESS)
    return made


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not whole numbers with commas between them") from None


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments)


def run(arguments: Sequence[str]) -> int:
    given = options().read(arguments)
    if given.words:
        raise UserError(f"'{given.words[0]}' is no option (--help shows all)")
    if given.compare:
        return compare(given)
    if not given.checkpoint:
        raise UserError("which checkpoint? --checkpoint RUN, the folder that training named")
    evaluate(given)
    return 0


def compare(given: argparse.Namespace) -> int:
    from adaptive.evaluation.files import kept
    from adaptive.evaluation.table import compared
    from adaptive.runs.folder import RunFolder

    if given.checkpoint:
        raise UserError("--compare reads what is kept of runs, and --checkpoint evaluates one: give one of them")
    runs = [RunFolder.at(text, "--compare") for text in given.compare]
    print("\n".join(compared({str(run): kept(run.path, given.name) for run in runs})))
    return 0


def evaluate(given: argparse.Namespace) -> None:
    import jax

    from adaptive.data.tokenizers import load_tokenizer
    from adaptive.evaluation import files
    from adaptive.evaluation.bound import denoiser_of
    from adaptive.evaluation.caches import check_caches
    from adaptive.evaluation.curve import check_depths
    from adaptive.evaluation.opening import locate
    from adaptive.evaluation.sets import open_sets
    from adaptive.evaluation.subject import check_objective, subject_of
    from adaptive.evaluation.table import lines_of
    from adaptive.evaluation.task_files import read_tasks
    from adaptive.runs.folder import RunFolder
    from adaptive.runs.load import load
    from adaptive.runs.mirror import place_of
    from adaptive.runs.platform import keep_compilations, start_backend

    place, found = locate(place_of(given.checkpoint, "--checkpoint"), given.step)
    folder = RunFolder.at(str(place), "--checkpoint")
    recipe = found.recipe
    if given.text_key:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, text_key=given.text_key))
    if recipe.objective.noisy:
        check_bound(given, recipe.objective.kind())
    else:
        check_objective(recipe)
        if given.draws:
            raise UserError(f"--draws is of models that fill in hidden tokens, and {recipe.name} predicts the next one")
    if given.depths:
        check_depths(recipe, given.depths)
    if given.caches:
        check_caches(recipe, given.caches)
    path = files.file_for(folder.path, found.step, given.name, ema=given.ema)
    tasks = read_tasks(given.tasks, given.shots)
    tokenizer = load_tokenizer(recipe.data.tokenizer, bos=recipe.data.bos, eos=recipe.data.eos)
    if given.harness:
        importlib.import_module("adaptive.evaluation.lm_eval")  # a missing package is told before anything is loaded
    scored = given.data or given.depths or given.caches or not (tasks or given.harness)
    sets = open_sets(given.data, recipe, tokenizer, stride=given.stride) if scored else []
    start_backend()
    keep_compilations()
    trained = load(found, ema=given.ema)
    subject: Any = denoiser_of(trained) if recipe.objective.noisy else subject_of(trained)
    _say(f"{recipe.name}, step {found.step}, on {jax.local_devices()[0].device_kind}")
    for one in sets:
        _say(f"{one.name}: {one.about}")
    told = {
        "recipe": recipe.name,
        "step": found.step,
        "ema": given.ema,
        "rules": list(subject.rules),
        "resamples": given.resamples,
        "row": recipe.data.seq_len,
        "stride": given.stride or recipe.data.seq_len,
        "rows": given.rows,
        **measured(given, trained, subject, sets, tasks),
    }
    if given.harness:
        told["harness"] = harness(given, trained)
    files.write(path, told)
    folder.push()
    print("\n".join(lines_of(told)))
    print(f"\nkept in {folder}/{path.relative_to(folder.path)}")


def check_bound(given: argparse.Namespace, kind: str) -> None:
    """Raises UserError for options that models of diffusion have nothing for."""
    for name in ("depths", "caches", "tasks", "harness", "stride"):
        if getattr(given, name):
            raise UserError(
                f"--{name} is of models that predict the next token, and this one was trained with objective={kind}: "
                "its loss on texts (--data) is a bound"
            )


def measured(
    given: argparse.Namespace, trained: Any, subject: Any, sets: Sequence[Any], tasks: Sequence[Any]
) -> dict[str, Any]:
    """What the evaluation finds, as JSON."""
    from adaptive.evaluation import bound
    from adaptive.evaluation.caches import cache_table
    from adaptive.evaluation.curve import depth_curve
    from adaptive.evaluation.evaluate import evaluate_sets
    from adaptive.evaluation.tasks import evaluate_tasks

    how: dict[str, Any] = {"most": given.rows, "resamples": given.resamples, "say": _say}
    if trained.recipe.objective.noisy:
        return bound.evaluate_sets(subject, sets, draws=given.draws or bound.DRAWS, **how)
    told = evaluate_sets(subject, sets, **how) if sets else {}
    if given.depths:
        told["depths"] = depth_curve(subject, sets, given.depths, **how)
    if given.caches:
        told["caches"] = cache_table(trained, subject, sets, given.caches, **how)
    if tasks:
        told |= evaluate_tasks(subject, tasks, **(how | {"most": given.items, "seeds": given.seeds}))
    return told


def harness(given: argparse.Namespace, trained: Any) -> dict[str, Any]:
    """What lm-evaluation-harness finds."""
    from adaptive.evaluation.lm_eval import run_tasks

    folder = str(local_path(given.harness_tasks, "--harness_tasks")) if given.harness_tasks else ""
    return run_tasks(trained, given.harness, folder, given.shots, given.items)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
