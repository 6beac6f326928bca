"""Makes a study, a sweep of runs and a page on what follows: adaptive study NAME [--workdir DIR] [--quick]

Runs go one after another; what is finished is not run again, and Ctrl-C saves, so that the same command goes on. On a
cluster, --list_runs prints a command for every run that is due; when they are done, the study's own makes the page.
Exit codes: 0 done, 2 something asked for cannot work, 3 runs became not finite, 75 stopped when asked and saved, 130
interrupted.
"""

if __name__ == "__main__":
    import sys

    from adaptive import command

    sys.exit(command.start("adaptive.study"))

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive import command, studies
from adaptive.command import number
from adaptive.data.files import write_text_atomically
from adaptive.errors import CheckpointError, NonFiniteError, UserError
from adaptive.paths import local_path
from adaptive.settings import nearest
from adaptive.sweeps import runs as sweep
from adaptive.sweeps.bar import Bar
from adaptive.sweeps.runs import Planned
from adaptive.training.report.numbers import compact

FORM_FILE = "study.json"


def options() -> command.Options:
    listed = "".join(f"\n  {name:8} {studies.load(name).about}" for name in studies.names())
    made = command.Options("study", f"{(__doc__ or '').strip()}\n\nstudies:{listed}")
    made.add_argument("name", nargs="?", default="", metavar="NAME", help="of the study")
    made.add_argument("--workdir", default="", help="where all is kept; a study that is there goes on (default: "
                      "runs/study-NAME, and its form)")  # fmt: skip
    made.add_argument("--quick", action="store_true", help="few and small runs: minutes, and little to learn from")
    made.add_argument("--match", choices=["compute", "data"], default="compute",
                      help="what runs of one size share: FLOPs of training (the default) or tokens")  # fmt: skip
    made.add_argument("--seeds", type=number(int, least=1, most=100),
                      help="of every run (default: as the study says, 1 or 3)")  # fmt: skip
    made.add_argument("--list_runs", action="store_true", help="print a command for each run that is due, and end")
    only = "make these runs alone; the one that finishes the study makes the page"
    made.add_argument("--only", nargs="+", default=[], metavar="RUN", help=only)
    return made


def main(arguments: Sequence[str]) -> int:
    return command.exit_code(run, arguments, interrupted="interrupted; the same command goes on")


def run(arguments: Sequence[str]) -> int:
    given = options().read(arguments)
    if not given.name:
        raise UserError(f"which study? there are: {', '.join(studies.names())}")
    study = studies.load(given.name)
    form = studies.Form(given.quick, given.seeds or study.seeds, given.match)
    workdir = local_path(given.workdir or default_workdir(given.name, form), "--workdir")
    check_form(workdir, given.name, form)
    planned = study.runs(form, workdir)
    chosen = named(planned, given.only)
    due = list(sweep.due(workdir, chosen))
    if given.list_runs:
        return list_runs(given, workdir, due, len(chosen))
    failed = perform(study, workdir, due, given.name, form) if due else []
    if isinstance(failed, int):
        return failed
    left = [run.name for run in sweep.due(workdir, planned)]
    if given.only and left:
        print(f"{len(left)} of {len(planned)} runs are left")
        return NonFiniteError.code if failed else 0
    return make_page(study, form, workdir, planned, failed)


def default_workdir(name: str, form: studies.Form) -> str:
    return f"runs/study-{name}" + "-quick" * form.quick + "-data" * (form.match == "data")


def check_form(workdir: Path, name: str, form: studies.Form) -> None:
    """Raises CheckpointError where the folder holds another study, or another form of this one; seeds may change."""
    asked = {"study": name, "quick": form.quick, "match": form.match}
    try:
        saved = json.loads((workdir / FORM_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {workdir / FORM_FILE}: {error}; choose another --workdir") from None
    if saved != asked:
        shown = ", ".join(f"{key} {saved.get(key) if isinstance(saved, dict) else '?'}" for key in asked)
        raise CheckpointError(f"{workdir} holds another study ({shown}): choose another --workdir")


def named(planned: Sequence[Planned], only: Sequence[str]) -> list[Planned]:
    """The runs called so, or all. Raises UserError for a name that there is not, with the nearest."""
    by_name = {run.name: run for run in planned}
    for name in only:
        if name not in by_name:
            near = nearest(name, by_name) or list(by_name)[:4]
            raise UserError(f"--only {name}: there is no such run; nearest: {', '.join(near)} (--list_runs shows all)")
    return [by_name[name] for name in only] or list(planned)


def list_runs(given: argparse.Namespace, workdir: Path, due: Sequence[Planned], total: int) -> int:
    form = ["--quick"] * given.quick + ["--match", given.match] * (given.match != "compute")
    form += ["--seeds", str(given.seeds)] * bool(given.seeds)
    for one in due:
        words = ["adaptive", "study", given.name, "--workdir", str(workdir), *form, "--only", one.name]
        print(shlex.join(words))
    flops = sum(one.flops for one in due)
    print(f"{len(due)} of {total} runs are due: {compact(flops, 'FLOP')}", file=sys.stderr)
    return 0


def perform(
    study: studies.Study, workdir: Path, due: Sequence[Planned], name: str, form: studies.Form
) -> list[str] | int:
    """Makes the runs; those that became not finite, or the exit code with which one was stopped or failed."""
    import jax

    from adaptive.convert import to_expert_choice
    from adaptive.runs.platform import start_backend
    from adaptive.train import train

    for one in due:
        one.recipe.validate()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        saved = {"study": name, "quick": form.quick, "match": form.match}
        write_text_atomically(workdir / FORM_FILE, json.dumps(saved) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write to {workdir}: {error.strerror or error}") from None
    study.prepare(workdir)
    start_backend()
    failed = []
    with Bar(len(due), sum(one.flops for one in due)) as bar:
        for one in due:
            each = one.flops / one.recipe.train.steps
            bar.at(one.name, 0.0)
            try:
                hear = functools.partial(_tell, bar, one.name, each)
                code = sweep.perform(workdir, one, train, hear, study.score, to_expert_choice)
            except NonFiniteError as error:
                failed.append(one.name)
                bar.finished(one.name, one.flops, f"not finite ({error})")
                continue
            if code:
                bar.say(f"{one.name} ended with code {code}, {one.log(workdir)} tells more; the same command goes on")
                return code
            found = sweep.kept(workdir, one)
            assert found is not None
            bar.finished(one.name, one.flops, f"held-out loss {found.loss:.4f}")
            jax.clear_caches()
    return failed


def _tell(bar: Bar, name: str, each: float, step: int) -> None:
    bar.at(name, each * step)


def make_page(
    study: studies.Study, form: studies.Form, workdir: Path, planned: Sequence[Planned], failed: Sequence[str]
) -> int:
    found: dict[str, Any] = {one.name: sweep.kept(workdir, one) for one in planned}
    missing = [name for name, outcome in found.items() if outcome is None]
    page = study.page(form, [outcome for outcome in found.values() if outcome is not None], missing)
    path = page.write(workdir)
    print("\n".join([*page.verdict, "", f"the page is {path}"]))
    return NonFiniteError.code if failed else 0
