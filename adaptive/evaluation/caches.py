"""Loss of generation with a cache, token by token, by the policy of a recursion's cache: what an inexact one costs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.account.caches import kept_per_token
from adaptive.data.batch import Batch
from adaptive.errors import RecipeError, UserError
from adaptive.evaluation import bootstrap
from adaptive.evaluation.evaluate import Measured, Say, difference, macro, measure
from adaptive.evaluation.sets import EvaluationSet
from adaptive.evaluation.subject import Score, Scores, Subject, said_of
from adaptive.inference.caching import with_cache
from adaptive.models import policies
from adaptive.models.policies import active_only
from adaptive.recipe import Recipe
from adaptive.runs.load import Trained
from adaptive.runs.platform import compute_dtype
from adaptive.runs.state import abstract_model
from kernels_pallas.choice import here

OPTION = "--caches"


def check_caches(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises UserError where the model cannot have one of these policies."""
    for name in names:
        with_cache(recipe, name, OPTION)


def cache_table(
    trained: Trained,
    subject: Subject,
    sets: Sequence[EvaluationSet],
    names: Sequence[str],
    *,
    most: int = 0,
    resamples: int = bootstrap.RESAMPLES,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Loss of every token where each one before it went through generation's step, with the exact cache and with these
    policies, and the differences on the same documents. JSON.

    Raises UserError as `check_caches`, and where the model cannot generate.
    """
    check_caches(trained.recipe, names)
    if trained.refuse_generation:
        raise UserError(f"{OPTION}: {trained.recipe.name} cannot generate: {trained.refuse_generation}")
    exact, rows = "per_pass", []
    for name in dict.fromkeys([exact, *names]):
        say(f"cache {name}, token by token")
        recipe = with_cache(trained.recipe, name, OPTION)
        policy = policies.named(name, OPTION)
        told = kept_per_token(nnx.merge(*_abstract(recipe)))[0]
        if isinstance(policy, active_only.Settings):  # no row may run out of slots
            recipe = with_cache(trained.recipe, "active_only(1)", OPTION)
        own = dataclasses.replace(subject, rules=("causal",), score=_decoded(trained, recipe))
        each = [measure(own, data, "causal", most=most, resamples=resamples) for data in sets]
        rows.append((name, told, each))
    first = rows[0][2]
    return {
        "points": [
            {
                "cache": name,
                "exact": told.exact,
                "bytes_per_token": told.bytes,
                **macro(each),
                "difference": _mean_difference(first, each),
                "per_set": {data.name: difference(a, b) for data, a, b in zip(sets, first, each, strict=True)},
            }
            for name, told, each in rows
        ]
    }


def _mean_difference(first: Sequence[Measured], other: Sequence[Measured]) -> dict[str, Any]:
    """Of the unweighted means over sets, in nats per token."""
    drawn = [
        b.resamples.loss - a.resamples.loss
        for a, b in zip(first, other, strict=True)
        if a.resamples is not None and b.resamples is not None
    ]
    known = len(drawn) == len(first)
    value = float(np.mean([b.told["loss"] - a.told["loss"] for a, b in zip(first, other, strict=True)]))
    return {"loss": value, "loss_interval": bootstrap.interval(np.mean(drawn, axis=0)) if known else None}


def _abstract(recipe: Recipe) -> tuple[nnx.GraphDef, Any]:
    return abstract_model(lambda key: recipe.model.build(key, dtype=compute_dtype(recipe)))


def _decoded(trained: Trained, recipe: Recipe) -> Score:
    """Scores by generation's step."""
    step = jax.jit(_score_step(_abstract(recipe)[0], recipe))

    def score(batch: Batch, rule: str, passes: int | None = None) -> Scores:
        if rule != "causal" or passes is not None:
            raise RecipeError("a cache is of generation: selection is causal, and passes are as trained")
        with here(recipe.train.kernels):
            return jax.tree.map(np.asarray, step(trained.state, batch))

    return score


def _score_step(graphdef: nnx.GraphDef, recipe: Recipe) -> Callable[[Any, Batch], Scores]:
    """A pure function (state of the model, batch) -> Scores, of documents that are generated one by one."""
    apart = not recipe.data.cross_document

    def score(state: Any, batch: Batch) -> Scores:
        rows, seq = batch.tokens.shape
        model = nnx.merge(graphdef, state)
        empty = model.init_cache(rows, seq)
        segments = jnp.asarray(batch.segment_ids)
        before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        begins = (segments != before) & apart
        marks = jnp.zeros((rows, seq), bool) if batch.boundaries is None else jnp.asarray(batch.boundaries)

        def step(cache: Any, own: Any) -> Any:
            token, begin, mark = own
            clean = lambda a, e: jnp.where(begin.reshape(1, -1, *(1,) * (a.ndim - 2)), e, a)  # noqa: E731
            cache = jax.lax.cond(begin.any(), lambda c: jax.tree.map(clean, c, empty), lambda c: c, cache)
            given = {} if batch.boundaries is None else {"boundaries": mark}
            out, cache = nnx.merge(graphdef, state).decode_step(token, cache, **given)
            return cache, (out.hidden[:, 0], out.trace.depth[:, 0])

        scanned = jnp.asarray(batch.tokens).T, begins.T, marks.T
        _, (hidden, depth) = jax.lax.scan(step, empty, scanned)
        said = said_of(model, hidden.swapaxes(0, 1), jnp.asarray(batch.targets))
        return Scores(said.nll, said.top, said.likeliest == batch.targets, depth.T, jnp.zeros(0, jnp.float32))

    return score
