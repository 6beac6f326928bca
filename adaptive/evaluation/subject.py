"""What is evaluated: a model that scores rows, whoever holds its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import RecipeError
from adaptive.models.language_model import Selecting
from adaptive.objectives.cross_entropy import chunk_length, predicted
from adaptive.parallel.rules import batch_shards, device_kind, narrowed, seq_shards
from adaptive.recipe import Recipe
from adaptive.runs.load import Trained
from kernels_pallas.choice import here

RULES: dict[str, Selecting] = {"train": "topk", "causal": "threshold"}
_MOST_TOKENS = 2**17  # of a batch on one device


class Scores(NamedTuple):
    """Of the rows of a batch, arrays of numpy once they are read.

    nll, top    f32[batch, seq]  nats of the target, and the probability of the likeliest token
    right       bool[batch, seq] whether that is the target
    depth       i32[batch, seq]  passes through a shared block; see `Trace`
    chunks      f32[stages]      chunks that each stage of an H-Net passes on, over all rows
    """

    nll: jax.Array
    top: jax.Array
    right: jax.Array
    depth: jax.Array
    chunks: jax.Array


Score = Callable[[Batch, str, int | None], Scores]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    rules  the rules of selection that differ and that it can be evaluated by: ("train", "causal"), or one of them
    score  (batch, rule, passes) -> Scores: passes of a recursion at most; None: as trained. Programs are compiled once
           for each shape, rule and number of passes
    rows   of a batch of data.seq_len tokens
    multiple  that the rows of any batch are of
    """

    recipe: Recipe
    step: int
    tokenizer: Tokenizer
    rules: tuple[str, ...]
    score: Score
    rows: int
    multiple: int = 1

    @property
    def rule(self) -> str:
        """The one that generation follows, where the model can."""
        return self.rules[-1]


def rules_of(model: Any) -> tuple[str, ...]:
    """Those of a model that differ; "causal" alone where both are one."""
    if model.refuse_generation() and model.selections() == ("topk",):
        return ("train",)
    return ("train", "causal") if len(model.selections()) > 1 else ("causal",)


def check_objective(recipe: Recipe) -> None:
    """Raises RecipeError for a model that does not predict the next token from the past."""
    if not recipe.objective.causal:
        raise RecipeError(
            f"{recipe.name} was trained with objective={recipe.objective.kind()}, which does not predict the next "
            "token from those before it: of its losses adaptive evaluate has the bound on texts (--data)"
        )


def make_score_step(
    graphdef: nnx.GraphDef, recipe: Recipe, rule: str, passes: int | None = None
) -> Callable[[Any, Batch], Scores]:
    """A pure function (state of the model, batch) -> Scores."""
    segmented = not recipe.data.cross_document

    def score(state: Any, batch: Batch) -> Scores:
        model = nnx.merge(graphdef, state)
        out = model(
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids if segmented else None,
            boundaries=batch.boundaries,
            selection=RULES[rule],
            passes=passes,
            logits=False,
        )
        said = said_of(model, out.hidden, jnp.asarray(batch.targets))
        counts = [(stage.boundary_mask & stage.valid).sum().astype(jnp.float32) for stage in out.trace.stages]
        chunks = jnp.stack(counts) if counts else jnp.zeros(0, jnp.float32)
        return Scores(said.nll, said.top, said.likeliest == batch.targets, out.trace.depth, chunks)

    return score


def said_of(model: Any, hidden: jax.Array, targets: jax.Array, never: int = -1) -> Any:
    """What a model predicts of targets i32[rows, n] from hidden [rows, n, width] (`cross_entropy.predicted`)."""
    weight = narrowed(model.head_weight(), hidden.dtype)
    rows, seq = targets.shape
    chunk = chunk_length(seq // seq_shards(), rows // batch_shards(), weight.shape[0], device_kind())
    return predicted(hidden, weight, targets, chunk, model.settings.logit_soft_cap, never)


def most_rows(recipe: Recipe) -> int:
    """Rows that are computed at once on one device."""
    train = recipe.train
    return min(
        train.device_batch_size or train.batch_size, train.batch_size, max(1, _MOST_TOKENS // recipe.data.seq_len)
    )


def subject_of(trained: Trained) -> Subject:
    """A model that was read from a checkpoint, on its device. Raises RecipeError as `check_objective`."""
    recipe = trained.recipe
    check_objective(recipe)
    compiled: dict[tuple[str, int | None], Any] = {}

    def score(batch: Batch, rule: str, passes: int | None = None) -> Scores:
        key = (rule, passes)
        if key not in compiled:
            compiled[key] = jax.jit(make_score_step(trained.graphdef, recipe, rule, passes))
        with here(recipe.train.kernels):
            return jax.tree.map(np.asarray, compiled[key](trained.state, batch))

    model = nnx.merge(trained.graphdef, trained.state)
    return Subject(recipe, trained.step, trained.tokenizer, rules_of(model), score, most_rows(recipe))
