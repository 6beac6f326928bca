"""The runs of a study: each is trained once in a folder of its own, scored, and what came out is kept there."""

import contextlib
import dataclasses
import io
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from adaptive.account import account, parameters
from adaptive.data.files import write_text_atomically
from adaptive.errors import CheckpointError, UserError
from adaptive.recipe import Recipe, identity_difference
from adaptive.runs.folder import RECIPE_FILE
from adaptive.training.report.retrofit import RETROFIT_FILE

OUTCOME_FILE = "outcome.json"
FORMAT = 1
RESAMPLES = 1000

Train = Callable[[Recipe, Path], int]
Hear = Callable[[int], None]


class Begins(NamedTuple):
    """From what a run begins: `run` is the name of another one, to be made before.

    settings  that the recipe has above that of the other one with expert choice in place of token choice
              (`adaptive convert --to_expert_choice`); None: its recipe says itself how it begins
    """

    run: str
    settings: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a study.

    name    of its folder, and on the command line
    labels  what the study tells its runs apart by; JSON
    begins  from what, if not from parameters that are drawn
    """

    name: str
    recipe: Recipe
    labels: Mapping[str, Any]
    begins: Begins | None = None

    @property
    def tokens(self) -> int:
        r = self.recipe
        return r.train.steps * r.train.batch_size * r.data.seq_len

    @property
    def flops(self) -> float:
        """Of training, as the account counts what is useful (`Account.train_flops_per_token`)."""
        return self.tokens * account(self.recipe.model, self.recipe.data.seq_len).train_flops_per_token

    def folder(self, workdir: Path) -> Path:
        return workdir / "runs" / self.name

    def log(self, workdir: Path) -> Path:
        """What its training prints: not in its folder, which is no run's before training makes it one."""
        return workdir / "logs" / f"{self.name}.txt"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave.

    seconds     of training, compilation left out
    told        by rule of selection, what `adaptive evaluate` says of the held-out text
    drawn       by rule, f64[resamples]: the loss of every resample of documents; those of all runs are paired
    rule        the one that generation follows
    start       how it was started, as `adaptive.runs.origin` has it
    """

    name: str
    labels: Mapping[str, Any]
    tokens: int
    flops: float
    parameters: Mapping[str, int]
    seconds: float
    rule: str
    told: Mapping[str, Any]
    drawn: Mapping[str, np.ndarray]
    start: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """Held out, nats per token, selected as in generation."""
        return self.told[self.rule]["loss"]

    @property
    def losses(self) -> np.ndarray:
        return self.drawn[self.rule]


class Scored(NamedTuple):
    """A finished run on held-out text; see `Outcome`."""

    rule: str
    told: Mapping[str, Any]
    drawn: Mapping[str, np.ndarray | None]


Score = Callable[[Any, Path], Scored]  # of what `adaptive.runs.load` gives, and the run's folder
Retrofit = Callable[[Path, Path, Sequence[str], str], None]  # run, folder to be made, settings, name of the recipe


def kept(workdir: Path, run: Planned) -> Outcome | None:
    """What a finished run gave; None where it is not finished.

    Raises CheckpointError where its folder holds one of other settings, or what cannot be read.
    """
    path = run.folder(workdir) / OUTCOME_FILE
    try:
        text = path.read_text(encoding="utf-8")
        saved = Recipe.from_json((path.parent / RECIPE_FILE).read_text(encoding="utf-8"), where=str(path.parent))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if lines := identity_difference(saved, run.recipe):
        raise CheckpointError(
            f"{path.parent} holds a run of other settings; saved there -> asked for:\n"
            + "\n".join(f"  {line}" for line in lines[:8])
            + "\nchoose another --workdir"
        )
    try:
        told = json.loads(text)
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}")
        drawn = {rule: np.array(values, np.float64) for rule, values in told["drawn"].items()}
        fields = {field.name: told[field.name] for field in dataclasses.fields(Outcome)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no outcome of a run ({error}): remove it, and the run is scored anew"
        ) from None
    return Outcome(**fields | {"drawn": drawn})


def perform(
    workdir: Path,
    run: Planned,
    train: Train,
    hear: Hear = lambda step: None,
    score: Score | None = None,
    retrofit: Retrofit | None = None,
) -> int:
    """Trains a run from where it is, scores it and keeps the outcome; the exit code of training, 0: all is done.

    train     (recipe, folder) -> exit code, as `adaptive.train.train`; what it prints goes into the run's log
    hear      is told the step now and then
    score     None: as `adaptive evaluate` does
    retrofit  `adaptive.convert.to_expert_choice`, for runs that begin so

    Raises CheckpointError where the disk refuses, UserError where the run that it begins from is not finished.
    """
    folder, log = run.folder(workdir), run.log(workdir)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise CheckpointError(f"cannot write {log}: {error.strerror or error}") from None
    with stream, contextlib.redirect_stdout(Heard(stream, hear)):
        if run.begins is not None:
            _begin(workdir, run, run.begins, retrofit)
        code = train(run.recipe, folder)
    if code:
        return code
    write_text_atomically(folder / OUTCOME_FILE, json.dumps(outcome(folder, run, score)) + "\n")
    return 0


def _begin(workdir: Path, run: Planned, begins: Begins, retrofit: Retrofit | None) -> None:
    """Makes the folder of a run that begins as another one with other routers, unless that is done."""
    folder, source = run.folder(workdir), workdir / "runs" / begins.run
    if not (source / OUTCOME_FILE).exists():
        raise UserError(f"{run.name} begins from {begins.run}, which is not finished: make that run first")
    if begins.settings is None or (folder / RETROFIT_FILE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # what an attempt left that was stopped on the way
    assert retrofit is not None
    retrofit(source, folder, begins.settings, run.name)


def scored(trained: Any, folder: Path) -> Scored:
    """All that a run holds out, as `adaptive evaluate` scores it."""
    from adaptive.evaluation.evaluate import measure
    from adaptive.evaluation.sets import open_sets
    from adaptive.evaluation.subject import subject_of

    subject = subject_of(trained)
    (data,) = open_sets((), trained.recipe, trained.tokenizer)
    found = {rule: measure(subject, data, rule, resamples=RESAMPLES) for rule in subject.rules}
    drawn = {rule: None if one.resamples is None else one.resamples.loss for rule, one in found.items()}
    return Scored(subject.rule, {rule: one.told for rule, one in found.items()}, drawn)


def outcome(folder: Path, run: Planned, score: Score | None = None) -> dict[str, Any]:
    """What `kept` reads: the newest checkpoint of the run, scored; score: as of `perform`."""
    from adaptive.runs.load import find, load
    from adaptive.runs.origin import this_start

    found = (score or scored)(load(find(folder)), folder)
    drawn = {
        rule: [] if losses is None else [round(float(loss), 6) for loss in losses]
        for rule, losses in found.drawn.items()
    }
    return {
        "format": FORMAT,
        "name": run.name,
        "labels": dict(run.labels),
        "tokens": run.tokens,
        "flops": run.flops,
        "parameters": dataclasses.asdict(parameters(run.recipe.model)),
        "seconds": _seconds(folder),
        "rule": found.rule,
        "told": dict(found.told),
        "drawn": drawn,
        "start": this_start() | {"processor": _processor(), "cores": os.cpu_count()},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _seconds(folder: Path) -> float:
    from adaptive.training.log import read_rows

    return max((float(row.get("seconds") or 0.0) for row in read_rows(folder)), default=0.0)


class Heard(io.TextIOBase):
    """A stream that writes into another, tells the steps that pass by, and shows what is said of a signal."""

    _STEP = re.compile(r"^step (\d+)/\d+", re.MULTILINE)

    def __init__(self, to: TextIO, hear: Hear):
        self._to, self._hear = to, hear

    def write(self, text: str) -> int:
        for found in self._STEP.finditer(text):
            self._hear(int(found[1]))
        if text.startswith("SIG"):
            print(f"\n{text.strip()}", file=sys.stderr, flush=True)
        return self._to.write(text)

    def flush(self) -> None:
        self._to.flush()


def due(workdir: Path, runs: list[Planned]) -> Iterator[Planned]:
    """Those that are not finished. Raises CheckpointError as `kept`."""
    return (run for run in runs if kept(workdir, run) is None)
