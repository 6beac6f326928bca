"""What the data room hands on: rows of tokens, and documents of a stream."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens; on a process, its own rows of the global batch.

    tokens       i32[batch, seq]   inputs
    targets      i32[batch, seq]   the token after each input
    positions    i32[batch, seq]   counted from the start of the document, or of the row where that cut the document
    segment_ids  i32[batch, seq]   which document of the row, from 1; 0 is padding
    mask         f32[batch, seq]   1 where the target counts: no padding, of its input's document and of no prompt
    boundaries   bool[batch, seq]  where chunks begin, as a splitter decides (data.boundaries); None: undecided
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    boundaries: np.ndarray | None = None


def make_row(tokens: np.ndarray, openings: np.ndarray, seq_len: int, filler: int) -> Batch:
    """A row (fields without the batch axis) of up to seq_len + 1 tokens.

    openings  i64[segments] ascending, the first 0: where in `tokens` each segment begins
    """
    used = len(tokens)
    segments = np.zeros(seq_len + 1, np.int32)
    segments[openings] = 1
    segments = np.cumsum(segments, dtype=np.int32)
    positions = np.arange(seq_len + 1) - openings[segments - 1]
    segments[used:] = 0
    padded = np.full(seq_len + 1, filler, np.int32)
    padded[:used] = tokens
    mask = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    inputs = segments[:-1].copy()
    inputs[used - 1 :] = 0  # the last token of a short window has no target
    return Batch(
        tokens=padded[:-1],
        targets=padded[1:],
        positions=np.where(inputs > 0, positions[:-1], 0).astype(np.int32),
        segment_ids=inputs,
        mask=mask.astype(np.float32),
    )


def stack(rows: list[Batch]) -> Batch:
    """Rows to a batch: a new leading axis."""
    fields: Any = (None if field[0] is None else np.stack(field) for field in zip(*rows, strict=True))
    return Batch(*fields)


def padding_row(seq_len: int, filler: int) -> Batch:
    """A row that counts for nothing."""
    zeros = np.zeros(seq_len, np.int32)
    tokens = np.full(seq_len, filler, np.int32)
    return Batch(tokens, tokens, zeros, zeros, zeros.astype(np.float32))


class Group(NamedTuple):
    """Consecutive documents of a stream.

    position  JSON from which `groups` continues with this very group
    first     index of its first document in the stream
    texts     the documents
    """

    position: dict
    first: int
    texts: list[str]


class DocumentStream(Protocol):
    """Documents in a fixed order, from any position met before."""

    name: str

    def groups(self, position: dict | None) -> Iterator[Group]:
        """Groups from `position` (None: the beginning) to the end of the data set."""
