"""The teacher of a run: a trained model that says what it expects behind every token of a batch."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import RecipeError
from adaptive.objectives import distillation
from adaptive.objectives.cross_entropy import chunk_length
from adaptive.objectives.distillation import Taught, expected
from adaptive.parallel.mesh import place
from adaptive.parallel.rules import AxisRules, batch_shards, device_kind
from adaptive.recipe import Recipe
from adaptive.runs.load import Found, find, load

Placed = Callable[[], contextlib.AbstractContextManager[None]]


def teacher_of(recipe: Recipe) -> Found | None:
    """The run that teaches, None without one. Raises CheckpointError where there is no such run, RecipeError where its
    tokens are others."""
    aim = recipe.objective
    if not isinstance(aim, distillation.Settings):
        return None
    found = find(aim.teacher, option="objective.teacher")
    if not found.recipe.objective.causal:
        raise RecipeError(
            f"objective.teacher={aim.teacher} was trained with objective={found.recipe.objective.kind()}, and a "
            "teacher says what the next token is"
        )
    theirs, ours = found.recipe.model.vocab_size, recipe.model.vocab_size
    if theirs != ours:
        raise RecipeError(f"objective.teacher={aim.teacher} predicts {theirs:,} tokens, and the model has {ours:,}")
    if found.recipe.data.tokenizer != recipe.data.tokenizer:
        prints = [load_tokenizer(r.data.tokenizer).fingerprint for r in (recipe, found.recipe)]
        if prints[0] != prints[1]:
            raise RecipeError(
                f"objective.teacher={aim.teacher} reads the tokens of {found.recipe.data.tokenizer}, and this run "
                f"those of {recipe.data.tokenizer}: a teacher needs the same"
            )
    return found


class Teacher:
    """A trained model on a mesh. Call it with a batch that lies there; `placed`: where its code is to be traced."""

    def __init__(self, found: Found, recipe: Recipe, mesh: Mesh, rules: AxisRules, placed: Placed):
        assert isinstance(recipe.objective, distillation.Settings)
        trained = load(found)
        shapes = jax.eval_shape(lambda: trained.state)
        self._state = jax.tree.map(_spread, trained.state, place(shapes, mesh, rules))
        self._segmented = not recipe.data.cross_document
        self._placed, self._kept = placed, recipe.objective.kept
        self._expects = jax.jit(self._expected, static_argnums=0)
        self._graphdef = trained.graphdef

    def __call__(self, batch: Batch) -> Taught:
        with self._placed():
            taught: Taught = self._expects(self._graphdef, self._state, batch)
        return taught

    def _expected(self, graphdef: Any, state: Any, batch: Any) -> Taught:
        model = nnx.merge(graphdef, state)
        segments = batch.segment_ids if self._segmented else None
        out = model(
            batch.tokens,
            positions=batch.positions,
            segment_ids=segments,
            boundaries=batch.boundaries,
            logits=False,
        )
        weight = model.head_weight().astype(out.hidden.dtype)
        rows, seq = batch.tokens.shape
        chunk = chunk_length(seq, rows // batch_shards(), weight.shape[0], device_kind())
        return expected(out.hidden, weight, self._kept, chunk, model.settings.logit_soft_cap)


def _spread(value: jax.Array, sharding: Any) -> jax.Array:
    """A process's own copy of an array as its part of one over the mesh."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
