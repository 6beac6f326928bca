"""An upper bound on the nats of texts, from a model that fills in hidden tokens: the mean over draws of what is hidden.

Each draw hides tokens of every row anew; draws are independent of each other, so that their spread tells the standard
error of the mean. Bootstraps over documents tell what other texts would have given.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.account import account
from adaptive.data.batch import Batch, stack
from adaptive.data.token_kinds import CLASSES, classes_of
from adaptive.data.tokenizers import Tokenizer
from adaptive.evaluation import bootstrap
from adaptive.evaluation.bootstrap import interval, resampled
from adaptive.evaluation.evaluate import Measured, Say, macro
from adaptive.evaluation.predictions import Sums, grouped, is_text
from adaptive.evaluation.sets import EvaluationSet
from adaptive.evaluation.subject import most_rows, said_of
from adaptive.objectives import asked, masked_diffusion
from adaptive.recipe import Recipe
from adaptive.runs.load import Trained
from kernels_pallas.choice import here

RULE = "train"  # of selection
DRAWS = 8
SHARES = 10  # groups of the hidden share, of equal width


class Drawn(NamedTuple):
    """Of a batch with some tokens hidden, [batch, seq] each.

    targets, before  i32  what is said at a position, and the token before that
    counted          bool targets that the bound is of
    nll, weights     f32  nats of each, and what they count: 0 where nothing is hidden
    right            bool whether the target is the likeliest token
    """

    targets: jax.Array
    before: jax.Array
    counted: jax.Array
    nll: jax.Array
    weights: jax.Array
    right: jax.Array


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model to evaluate: draw(batch, key) hides tokens and says what they are; rows of a batch."""

    recipe: Recipe
    tokenizer: Tokenizer
    draw: Callable[[Batch, jax.Array], Drawn]
    rows: int
    rules: tuple[str, ...] = (RULE,)


def denoiser_of(trained: Trained) -> Denoiser:
    """A model that was read from a checkpoint, on its device."""
    recipe, step = trained.recipe, jax.jit(make_draw_step(trained.graphdef, trained.recipe))

    def draw(batch: Batch, key: jax.Array) -> Drawn:
        with here(recipe.train.kernels):
            return jax.tree.map(np.asarray, step(trained.state, batch, key))

    return Denoiser(recipe, trained.tokenizer, draw, most_rows(recipe))


def make_draw_step(graphdef: nnx.GraphDef, recipe: Recipe) -> Callable[[Any, Batch, jax.Array], Drawn]:
    """A pure function (state of the model, batch, key) -> Drawn."""
    aim = recipe.objective
    assert isinstance(aim, masked_diffusion.Settings)

    def draw(state: Any, batch: Batch, key: jax.Array) -> Drawn:
        model, inputs = nnx.merge(graphdef, state), aim.held_out(batch, key)
        given = asked(aim, inputs, batch, segmented=not recipe.data.cross_document)
        hidden = model(inputs.tokens, **given, logits=False).hidden
        said = said_of(model, hidden[:, -inputs.targets.shape[1] :], inputs.targets, aim.never)
        counted = jnp.asarray(inputs.counted) > 0
        right = said.likeliest == inputs.targets
        return Drawn(inputs.targets, jnp.asarray(inputs.before), counted, said.nll, inputs.weights, right)

    return draw


class _Heard(NamedTuple):
    """Of all targets, flat [n], in the order of the set: token, bytes, document, row; nats f64[draws, n] and whether
    the likeliest was right f64[n], what hidden ones count included; hidden tokens, and their nats, by their share."""

    token: np.ndarray
    size: np.ndarray
    document: np.ndarray
    row: np.ndarray
    nats: np.ndarray
    right: np.ndarray
    shares: tuple[np.ndarray, np.ndarray]


def measure(
    subject: Denoiser, data: EvaluationSet, *, draws: int = DRAWS, most: int = 0, resamples: int = bootstrap.RESAMPLES
) -> Measured:
    """The bound on one set, or on `most` of its rows (0: all)."""
    heard = _draws(subject, data, draws, most)
    text = is_text(heard.token, subject.tokenizer)
    size = float(heard.size.sum())
    total, of_text = heard.nats.sum(1), (heard.nats * text).sum(1)
    documents = len(np.unique(heard.document))
    unit, by = (heard.document, "documents") if documents >= bootstrap.FEWEST else (heard.row, "rows")
    drawn = resampled(_sums(unit, heard, text), 0, resamples)
    in_bits = 1 / (math.log(2) * size) if size else math.nan
    flops = subject.recipe.objective.forward_flops(account(subject.recipe.model, subject.recipe.data.seq_len).stages)
    cost = round(flops / subject.recipe.data.seq_len / 1e6, 6)
    told = {
        "bound": True,
        "draws": draws,
        "targets": len(heard.token),
        "bytes": int(size),
        "documents": documents,
        "resampled": by,
        "loss": float(total.mean() / len(heard.token)),
        "loss_error": _error(total, 1 / len(heard.token)),
        "loss_interval": interval(None if drawn is None else drawn.loss),
        "bits_per_byte": float(of_text.mean() * in_bits) if size else None,
        "bits_per_byte_error": _error(of_text, in_bits) if size else None,
        "bits_per_byte_interval": interval(None if drawn is None else drawn.bits_per_byte),
        "accuracy": float(heard.right.mean()),
        "by_kind": _by_kind(heard, subject.tokenizer),
        "by_share": _by_share(heard.shares),
        "compute": {"mflop_per_token": {"paid": cost, "active": cost}},
    }
    return Measured(told, drawn)


def evaluate_sets(
    subject: Denoiser,
    sets: Sequence[EvaluationSet],
    *,
    draws: int = DRAWS,
    most: int = 0,
    resamples: int = bootstrap.RESAMPLES,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The bound on every set and their mean; JSON as of `adaptive.evaluation.evaluate.evaluate_sets`."""
    found: dict[str, Measured] = {}
    for data in sets:
        say(f"{data.name}, {draws} draws")
        found[data.name] = measure(subject, data, draws=draws, most=most, resamples=resamples)
    told = {name: {RULE: one.told} for name, one in found.items()}
    return {"sets": told, "macro": {RULE: macro(list(found.values()))}}


def _draws(subject: Denoiser, data: EvaluationSet, draws: int, most: int) -> _Heard:
    key, counts = jax.random.key(0), subject.tokenizer.byte_counts()
    parts: list[list[np.ndarray]] = []
    shares = np.zeros(SHARES), np.zeros(SHARES)
    number = 0
    for group, rows in enumerate(grouped(data.first(most), subject)):
        batch = stack([row.batch for row in rows])
        keys = (jax.random.fold_in(jax.random.fold_in(key, draw), group) for draw in range(draws))
        of = [subject.draw(batch, each) for each in keys]
        where = np.asarray(of[0].counted)
        documents = _documents(subject.recipe, batch, np.stack([row.documents for row in rows]))
        numbers = np.broadcast_to(number + np.arange(len(rows))[:, None], where.shape)
        sizes = np.asarray(counts.of(of[0].targets, of[0].before))
        told = [np.asarray(a)[where] for a in (of[0].targets, sizes, documents, numbers)]
        nats = np.stack([(np.asarray(each.nll, np.float64) * each.weights)[where] for each in of])
        right = np.stack([np.asarray(each.right * each.weights, np.float64)[where] for each in of])
        parts.append([*told, nats, right.mean(0)])
        for each in of:
            _add_shares(shares, each)
        number += len(rows)
    token, size, document, row, nats, right = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return _Heard(token, size, document, row, nats, right, shares)


def _documents(recipe: Recipe, batch: Batch, of_targets: np.ndarray) -> np.ndarray:
    """i64[rows, seq]: the document of what is said at each position, from those of the tokens that follow."""
    told = recipe.objective.denoising()
    if told is not None and told.shifted:
        return of_targets
    before = np.concatenate([of_targets[:, :1], of_targets[:, :-1]], axis=1)
    return np.where(batch.positions == 0, of_targets, before)


def _add_shares(shares: tuple[np.ndarray, np.ndarray], drawn: Drawn) -> None:
    """Adds the hidden tokens, and their nats, to those of their share, which is one over what they count."""
    hidden = np.asarray(drawn.weights) > 0
    at = np.ceil(SHARES / np.asarray(drawn.weights)[hidden] - 1e-4).astype(int) - 1
    for sums, of in zip(shares, (None, np.asarray(drawn.nll, np.float64)[hidden]), strict=True):
        sums += np.bincount(at, of, minlength=SHARES)


def _sums(unit: np.ndarray, heard: _Heard, text: np.ndarray) -> Sums:
    """Of each unit, nats being means over draws."""
    _, index = np.unique(unit, return_inverse=True)
    nats = heard.nats.mean(0)
    add = lambda weights: np.bincount(index, weights)  # noqa: E731
    return Sums(add(nats), add(np.ones(len(nats))), add(nats * text), add(heard.size.astype(np.float64)))


def _error(totals: np.ndarray, by: float) -> float | None:
    """The standard error of the mean of f64[draws], times `by`; None of one draw."""
    return float(totals.std(ddof=1) / len(totals) ** 0.5) * by if len(totals) > 1 else None


def _by_kind(heard: _Heard, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Nats of targets by what they are; see `adaptive.data.token_kinds`."""
    classes = classes_of(tokenizer)
    kinds = classes[np.minimum(heard.token, len(classes) - 1)]
    count, nats = np.bincount(kinds), np.bincount(kinds, heard.nats.mean(0))
    return [
        {"kind": CLASSES[i], "targets": int(count[i]), "loss": float(nats[i] / count[i])} for i in np.flatnonzero(count)
    ]


def _by_share(shares: tuple[np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
    """Nats of a hidden token by the share of its row, or block, that is hidden."""
    count, nats = shares
    return [
        {"to": round((i + 1) / SHARES, 6), "targets": int(count[i]), "loss": float(nats[i] / count[i])}
        for i in np.flatnonzero(count)
    ]
