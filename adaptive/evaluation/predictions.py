"""Everything a model predicted of a set, target by target, and what follows from it: plain functions of flat arrays."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from adaptive.data.batch import padding_row, stack
from adaptive.data.token_kinds import CLASSES, classes_of
from adaptive.data.tokenizers import Tokenizer
from adaptive.evaluation.sets import EvaluationSet, Row
from adaptive.evaluation.subject import Subject

BINS = 15  # of equal width over [0, 1], of the probability of the likeliest token


class Predictions(NamedTuple):
    """Of every target that counts, in the order of the set.

    nll, top  f32[n]   nats, and the probability of the likeliest token
    right     bool[n]  whether that was the target
    token     i32[n]   the target
    size      i32[n]   bytes of text that it stands for
    context   i32[n]   tokens of its document before it in its row
    document  i64[n]
    row       i32[n]
    """

    nll: np.ndarray
    top: np.ndarray
    right: np.ndarray
    token: np.ndarray
    size: np.ndarray
    context: np.ndarray
    document: np.ndarray
    row: np.ndarray


class Computed(NamedTuple):
    """What the model did for all tokens that it read.

    read    tokens
    depths  i64[passes + 1]: tokens of each depth, from 0
    chunks  f64[stages]: chunks that each stage of an H-Net passed on
    """

    read: int
    depths: np.ndarray
    chunks: np.ndarray


def predict(
    subject: Subject, data: EvaluationSet, rule: str, passes: int | None = None, most: int = 0
) -> tuple[Predictions, Computed]:
    """Scores a set, or `most` of its rows evenly spaced over it (0: all)."""
    counts = subject.tokenizer.byte_counts()
    told, done = [], []
    number = 0
    for rows in grouped(data.first(most), subject):
        batch = stack([row.batch for row in rows])
        scores = subject.score(batch, rule, passes)
        counted, present = batch.mask > 0, batch.segment_ids > 0
        documents = np.stack([row.documents for row in rows])
        numbers = np.broadcast_to(number + np.arange(len(rows), dtype=np.int32)[:, None], counted.shape)
        sizes = np.asarray(counts.of(batch.targets, batch.tokens))
        each = (scores.nll, scores.top, scores.right, batch.targets, sizes, batch.positions + 1, documents, numbers)
        told.append(Predictions(*(np.asarray(a)[counted] for a in each)))
        done.append((int(present.sum()), np.bincount(np.asarray(scores.depth)[present]), np.asarray(scores.chunks)))
        number += len(rows)
    deepest = max(len(depths) for _, depths, _ in done)
    computed = Computed(
        sum(read for read, _, _ in done),
        np.array([np.pad(depths, (0, deepest - len(depths))) for _, depths, _ in done]).sum(0),
        np.array([chunks for _, _, chunks in done], np.float64).sum(0),
    )
    return Predictions(*map(np.concatenate, zip(*told, strict=True))), computed


def grouped(rows: Iterator[Row], subject: Any) -> Iterator[list[Row]]:
    """Rows in batches of one size; what fills up the last counts for nothing."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == subject.rows:
            yield held
            held = []
    if held:
        like = held[0]
        filler = padding_row(len(like.batch.tokens), subject.tokenizer.eos_id)
        if like.batch.boundaries is not None:
            filler = filler._replace(boundaries=np.zeros_like(like.batch.boundaries))
        yield [*held, *[Row(filler, np.zeros_like(like.documents))] * (subject.rows - len(held))]


# Sums


class Sums(NamedTuple):
    """f64[units] each: nats and targets, all of them; nats of targets that stand for text, and bytes of text."""

    nats: np.ndarray
    targets: np.ndarray
    text_nats: np.ndarray
    bytes: np.ndarray

    def loss(self) -> np.ndarray:
        """Nats per token, of sums over units along the last axis."""
        return self.nats.sum(-1) / self.targets.sum(-1)

    def bits_per_byte(self) -> np.ndarray:
        """Without markers, which stand for no text: they count in neither sum."""
        return self.text_nats.sum(-1) / math.log(2) / self.bytes.sum(-1)


def sums_by(unit: np.ndarray, said: Predictions, tokenizer: Tokenizer) -> Sums:
    """The sums of each unit, such as a document: `unit` i64[n]."""
    _, index = np.unique(unit, return_inverse=True)
    text = is_text(said.token, tokenizer)
    nats = said.nll.astype(np.float64)
    add = lambda weights: np.bincount(index, weights)  # noqa: E731
    return Sums(add(nats), add(np.ones(len(nats))), add(nats * text), add(said.size.astype(np.float64)))


def is_text(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """bool[n]: which of the tokens i32[n] stand for text."""
    kinds, index = np.unique(tokens, return_inverse=True)
    return np.array([not tokenizer.is_special(int(token)) for token in kinds], bool)[index]


# What follows


def calibration(said: Predictions) -> dict[str, Any]:
    """Expected calibration error of the likeliest token: over bins of its probability p, the mean of
    |share that was right - mean p|, weighted by targets."""
    which = np.minimum((np.nan_to_num(said.top) * BINS).astype(int), BINS - 1)
    targets = np.bincount(which, minlength=BINS)
    sure = np.bincount(which, said.top.astype(np.float64), minlength=BINS)
    right = np.bincount(which, said.right.astype(np.float64), minlength=BINS)
    some = targets > 0
    bins = [
        {"targets": int(n), "probability": round(p / n, 6), "right": round(r / n, 6)}
        for n, p, r in zip(targets[some], sure[some], right[some], strict=True)
    ]
    return {"error": float(np.abs(right - sure).sum() / targets.sum()), "bins": bins}


def by_kind(said: Predictions, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Losses of targets by what they are; see `adaptive.data.token_kinds`."""
    classes = classes_of(tokenizer)
    # Ids that only pad the vocabulary are no targets of text, but data of another's making may hold some.
    kinds = classes[np.minimum(said.token, len(classes) - 1)]
    return [{"kind": CLASSES[i], **entry} for i, entry in _by(kinds, said)]


def by_context(said: Predictions) -> list[dict[str, Any]]:
    """Losses of targets by how many tokens of their document are before them in their row: 1, 2 to 3, 4 to 7, ..."""
    bucket = np.floor(np.log2(said.context)).astype(int)
    return [{"from": 2**i, "to": 2 ** (i + 1) - 1, **entry} for i, entry in _by(bucket, said)]


def _by(group: np.ndarray, said: Predictions) -> Iterator[tuple[int, dict[str, Any]]]:
    targets, nats = np.bincount(group), np.bincount(group, said.nll.astype(np.float64))
    for i in np.flatnonzero(targets):
        yield int(i), {"targets": int(targets[i]), "loss": float(nats[i] / targets[i])}
