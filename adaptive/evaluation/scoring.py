"""Scores of token sequences of any lengths: one scorer for tasks of ours and for lm-evaluation-harness."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from adaptive.data.batch import Batch, make_row, padding_row, stack
from adaptive.data.words import row_marker
from adaptive.evaluation.prompts import Span
from adaptive.evaluation.subject import Subject

SHORTEST = 32  # inputs of the shortest rows; others are powers of two, up to the rows that the model was trained on


class Scored(NamedTuple):
    """Of the scored tokens of a span: nll f32[n], right bool[n] whether each was the likeliest; cut: whether tokens
    were left out in front, as the row has no room for all."""

    nll: np.ndarray
    right: np.ndarray
    cut: bool


def score_spans(subject: Subject, spans: Sequence[Span], rule: str | None = None) -> list[Scored]:
    """The scores of each span, whatever others there are: by the rule of generation, and in a row of its own.

    Rows come in a few lengths, in batches of one size for each, so that few programs are compiled. A span that is
    longer than the rows of training loses tokens in front.
    """
    longest = subject.recipe.data.seq_len
    fitted = [_fitted(span, longest) for span in spans]
    found: dict[int, Scored] = {}
    for length in sorted({_bucket(len(span.tokens) - 1, longest) for span in fitted}):
        numbers = [i for i, span in enumerate(fitted) if _bucket(len(span.tokens) - 1, longest) == length]
        for group in _groups(numbers, rows_of(subject, length)):
            scores = subject.score(_batch(subject, [fitted[i] for i in group], length), rule or subject.rule, None)
            for at, i in enumerate(group):
                part = slice(fitted[i].start - 1, len(fitted[i].tokens) - 1)
                cut = len(fitted[i].tokens) < len(spans[i].tokens)
                found[i] = Scored(np.asarray(scores.nll[at, part]), np.asarray(scores.right[at, part]), cut)
    return [found[i] for i in range(len(spans))]


def rows_of(subject: Subject, length: int) -> int:
    """Rows of so many inputs that are computed at once: as many tokens as in a batch of whole rows."""
    rows = subject.rows * subject.recipe.data.seq_len // length
    return max(1, rows // subject.multiple) * subject.multiple


def _bucket(inputs: int, longest: int) -> int:
    return min(longest, max(SHORTEST, 1 << max(0, inputs - 1).bit_length()))


def _fitted(span: Span, longest: int) -> Span:
    cut = max(0, len(span.tokens) - longest - 1)
    return Span(span.tokens[cut:], max(1, span.start - cut))


def _groups(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _batch(subject: Subject, spans: Sequence[Span], length: int) -> Batch:
    """The spans, and rows without a token to fill the batch up."""
    filler = subject.tokenizer.eos_id
    rows = [make_row(span.tokens, np.zeros(1, np.int64), length, filler) for span in spans]
    rows += [padding_row(length, filler)] * (rows_of(subject, length) - len(spans))
    mark = row_marker(subject.recipe.data.boundaries, subject.tokenizer)
    return stack([mark(row) for row in rows])
