"""In a run, what `adaptive evaluate` computes of a checkpoint: sets and tasks that the recipe names (`eval`)."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import Tokenizer
from adaptive.evaluation.evaluate import macro, measure
from adaptive.evaluation.sets import MEAN, EvaluationSet, open_sets
from adaptive.evaluation.subject import Scores, Subject, check_objective, make_score_step, rules_of
from adaptive.evaluation.task_files import Task, read_tasks
from adaptive.evaluation.tasks import SEEDS, evaluate_tasks
from adaptive.recipe import Recipe
from adaptive.runs.state import TrainState
from adaptive.training.program import Program

_RESAMPLES = 2  # intervals are for `adaptive evaluate`


def opened(recipe: Recipe, tokenizer: Tokenizer) -> tuple[list[EvaluationSet], list[Task]]:
    """The recipe's sets and tasks; text is tokenised into the cache first.

    Raises UserError for what cannot be read or does not fit the model.
    """
    config = recipe.eval
    if not (config.sets or config.tasks):
        return [], []
    check_objective(recipe)
    sets = open_sets(config.sets, recipe, tokenizer, option="eval.sets") if config.sets else []
    return sets, read_tasks(config.tasks, option="eval.tasks")


class SetsAndTasks:
    """Scores the recipe's sets and tasks with the state of a run, on its mesh, by the rule that generation follows."""

    def __init__(self, program: Program, tokenizer: Tokenizer):
        self._program, self._tokenizer = program, tokenizer
        self._sets, self._tasks = opened(program.recipe, tokenizer)
        self._compiled: dict[tuple[str, int | None], Any] = {}

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Columns of a metrics row: eval/sets/NAME/loss and bits_per_byte, eval/tasks/NAME/accuracy and centred, and
        the means over them under the name mean."""
        if not (self._sets or self._tasks):
            return {}
        subject, rows = self._subject(state), self._program.recipe.eval.rows
        columns: dict[str, Any] = {}
        measured = [measure(subject, one, subject.rule, most=rows, resamples=_RESAMPLES) for one in self._sets]
        told = {data.name: one.told for data, one in zip(self._sets, measured, strict=True)}
        for name, one in (told | ({MEAN: macro(measured)} if len(measured) > 1 else {})).items():
            columns |= {f"eval/sets/{name}/{key}": one[key] for key in ("loss", "bits_per_byte")}
        if self._tasks:
            found = evaluate_tasks(subject, self._tasks, seeds=SEEDS[:1], resamples=_RESAMPLES)
            for name, one in found["tasks"].items():
                columns |= {f"eval/tasks/{name}/{key}": one[key] for key in ("accuracy", "centred")}
            columns["eval/tasks/mean/centred"] = found["tasks_mean"]["centred"]
        return columns

    def _subject(self, state: TrainState) -> Subject:
        program, recipe = self._program, self._program.recipe

        def score(batch: Batch, rule: str, passes: int | None = None) -> Scores:
            key = (rule, passes)
            if key not in self._compiled:
                self._compiled[key] = self._jitted(rule, passes)
            with program.placed():
                given = program.to_devices(batch, whole=True)
                return jax.device_get(self._compiled[key](state.params, state.buffers, given))

        model = nnx.merge(program.graphdef, state.params, state.buffers)
        return Subject(
            recipe, int(state.step), self._tokenizer, rules_of(model), score, recipe.train.batch_size, program.shards
        )

    def _jitted(self, rule: str, passes: int | None) -> Any:
        step = make_score_step(self._program.graphdef, self._program.recipe, rule, passes)
        of_parts = lambda params, buffers, batch: step(nnx.merge_state(params, buffers), batch)  # noqa: E731
        return jax.jit(of_parts, out_shardings=NamedSharding(self._program.mesh, P()))
