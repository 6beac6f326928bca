"""A run as a report sees it: the files of its workdir, and the few numbers that sum it up."""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from adaptive.errors import RecipeError, UserError
from adaptive.recipe import Recipe, difference, leaves, load, show
from adaptive.runs.folder import METRICS_FILE, RECIPE_FILE
from adaptive.training.alarms import alarms, health_warnings
from adaptive.training.log import Row, is_evaluation, read_rows, shown_gaps, steps_without_row
from adaptive.training.report.schema import (
    PLAN_FILE,
    ROUTING_FILE,
    PlanRecord,
    RoutingRecord,
    load_record,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """training and evaluations are the rows of metrics.jsonl by kind; `missing` says in sentences what is not there."""

    path: Path
    training: list[Row]
    evaluations: list[Row]
    plan: PlanRecord
    routing: RoutingRecord
    recipe: Recipe | None
    missing: tuple[str, ...]

    @functools.cached_property
    def facts(self) -> Any:
        """Of the model (`adaptive.models.facts`); None without a recipe."""
        return self.recipe.model.facts() if self.recipe else None

    @property
    def chunking(self) -> tuple[Any, ...]:
        """Settings of every chunking stage; () where there are none or no recipe tells."""
        return tuple(settings for _, settings in self.facts.chunking) if self.facts else ()

    @property
    def experts(self) -> tuple[Any, ...]:
        """Routed feed-forwards; () where there are none or no recipe tells."""
        return self.facts.experts if self.facts else ()

    @property
    def title(self) -> str:
        """What the model is called."""
        return self.facts.title if self.facts else self.plan.title

    @property
    def name(self) -> str:
        return self.plan.name or (self.recipe.name if self.recipe else "") or self.path.name

    @property
    def last(self) -> Row:
        """The newest training row, {} before the first."""
        return self.training[-1] if self.training else {}

    @property
    def last_evaluation(self) -> Row:
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def step(self) -> int:
        return max((row["step"] for row in (*self.training, *self.evaluations)), default=0)

    @property
    def finished(self) -> bool:
        return 0 < self.plan.steps <= self.step

    @property
    def seconds(self) -> float | None:
        return max((row["seconds"] for row in (*self.training, *self.evaluations) if row.get("seconds")), default=None)

    @property
    def flops_saved(self) -> float | None:
        """Share of the dense-equivalent FLOPs that routing spared; None where not known."""
        plan = self.plan
        return 1 - plan.flops_per_step / plan.dense_flops_per_step if plan.dense_flops_per_step else None

    def typical(self, name: str) -> float | None:
        """The median of a column of the training rows."""
        values = [row[name] for row in self.training if row.get(name) is not None]
        return statistics.median(values) if values else None

    def points(self, name: str, x: str) -> list[tuple[float, float]]:
        """(row[x], row[name]) of all rows that have both; `flops` is made up from the plan where a row has none."""
        per_step = self.plan.flops_per_step
        out = []
        for row in self.evaluations if name.startswith("eval/") else self.training:
            at = row.get(x, row["step"] * per_step if x == "flops" and per_step else None)
            if at is not None and row.get(name) is not None:
                out.append((float(at), float(row[name])))
        return out

    def warnings(self) -> list[str]:
        progress = self.step / self.plan.steps if self.plan.steps else 1.0
        skipped = sum(row.get("skipped") or 0 for row in self.training)
        newest = {**self.last_evaluation, **self.last, "skipped": skipped}
        heard = alarms(self.facts) if self.facts else []
        for row in sorted((*self.training, *self.evaluations), key=lambda row: row["step"]):
            for alarm in heard:
                alarm(row)
        recursion = self.facts.recursion if self.facts else "model.body"
        health = health_warnings(newest, recursion, progress)
        before = [(row["step"], health_warnings(row, recursion)) for row in self.evaluations]
        found = [f"{text}{_since(name, before)}" for name, text in health.items()]
        return list(dict.fromkeys(found + [text for alarm in heard for text in alarm.standing()]))

    def settings(self) -> list[tuple[str, str]]:
        """(dotted path, value) of every setting of the recipe."""
        return [(path, show(value)) for path, value in leaves(self.recipe).items()] if self.recipe else []

    def changed(self) -> list[str]:
        """What differs from the recipe's file, "path: there -> here"; nothing if that is not known."""
        if self.recipe is None:
            return []
        try:
            return difference(load(self.recipe.name), self.recipe)
        except RecipeError:
            return []


def _since(name: str, before: Sequence[tuple[int, Mapping[str, str]]]) -> str:
    """Since which of the evaluations without a break there was reason for the warning of this name; "" where the newest
    alone has it."""
    since = [step for step, _ in itertools.takewhile(lambda one: name in one[1], reversed(before))]
    return f" (so since step {since[-1]:,})" if len(since) > 1 else ""


def load_run(workdir: str | Path) -> Run:
    """The run kept in a folder. Files that are missing or damaged are reported in `missing`.

    Raises UserError where there is no such folder, or none of the files.
    """
    path = Path(workdir)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the --workdir of a run")
    files = (METRICS_FILE, RECIPE_FILE, PLAN_FILE, ROUTING_FILE)
    if not any((path / name).exists() for name in files):
        raise UserError(f"{path} holds no run: none of {', '.join(files)} is there; give the --workdir of a run")
    missing: list[str] = []
    rows = read_rows(path)
    if not rows:
        missing.append(f"{METRICS_FILE} has no rows: the run ended before its first logged step")
    plan = _or_default(lambda: load_record(PlanRecord, path), PlanRecord(), PLAN_FILE, "sizes and FLOPs", missing)
    routing = _or_default(
        lambda: load_record(RoutingRecord, path),
        RoutingRecord(),
        ROUTING_FILE,
        "routing on held-out text, which an evaluation writes",
        missing,
    )
    recipe = _or_default(lambda: _recipe(path), None, RECIPE_FILE, "the settings", missing)
    training = [row for row in rows if not is_evaluation(row)]
    evaluations = [row for row in rows if is_evaluation(row)]
    if training and (gaps := steps_without_row(rows, training[-1]["step"])):
        missing.append(f"{METRICS_FILE} has no row of step {shown_gaps(gaps)}")
    if rows and not evaluations:
        missing.append("no evaluation on held-out text has been made yet")
    return Run(path, training, evaluations, plan, routing, recipe, tuple(missing))


def _or_default(read: Callable[[], T | None], default: T, name: str, what: str, missing: list[str]) -> T:
    try:
        found = read()
    except UserError as error:
        missing.append(str(error))
        return default
    if found is None:
        missing.append(f"{name} is missing: {what}")
        return default
    return found


def _recipe(path: Path) -> Recipe | None:
    file = path / RECIPE_FILE
    if not file.exists():
        return None
    try:
        return Recipe.from_json(file.read_text(encoding="utf-8"), where=str(file))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
