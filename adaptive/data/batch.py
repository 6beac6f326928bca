"""What the data room hands on: rows of tokens, and documents of a stream."""

from collections.abc import Iterator, Sequence
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
    taught       what a teacher expects, where a run has one; made on the devices
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    boundaries: np.ndarray | None = None
    taught: Any = None


def make_row(tokens: np.ndarray, openings: np.ndarray, seq_len: int, filler: int) -> Batch:
    """A row (fields without the batch axis) of up to seq_len + 1 tokens.

    openings  i64[segments] ascending, the first 0: where in `tokens` each segment begins
    """
    padded = np.full((1, seq_len + 1), filler, np.int32)
    padded[0, : len(tokens)] = tokens
    rows = make_rows(padded, np.array([len(tokens)]), np.zeros(len(openings), np.int64), openings)
    return row_of(rows, 0)


def make_rows(tokens: np.ndarray, used: np.ndarray, rows: np.ndarray, openings: np.ndarray) -> Batch:
    """Rows as a batch.

    tokens          i32[batch, seq + 1]  inputs and one target more, padded at the end
    used            i64[batch]           tokens of each row that are no padding
    rows, openings  i64[segments]        in which row and where in it a segment begins; the first of a row always does
    """
    count, width = tokens.shape
    column = np.arange(width, dtype=np.int32)
    opens = np.zeros((count, width), bool)
    opens[:, 0] = True
    opens[rows, openings] = True
    at = np.flatnonzero(opens[:, :-1])  # of all rows end to end
    row, lengths = at // (width - 1), np.diff(at, append=count * (width - 1))
    number = np.arange(len(at)) - np.searchsorted(row, np.arange(count))[row] + 1
    segments = np.repeat(number.astype(np.int32), lengths).reshape(count, -1)
    begins = np.repeat((at % (width - 1)).astype(np.int32), lengths).reshape(count, -1)
    positions = column[:-1] - begins
    counts = ~opens[:, 1:]
    if (used < width).any():
        predicts = column[:-1] < used[:, None] - 1  # the last token of a short row has no target
        segments, positions, counts = segments * predicts, positions * predicts, counts & predicts
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=positions,
        segment_ids=segments,
        mask=counts.astype(np.float32),
    )


def row_of(batch: Batch, index: int) -> Batch:
    """One row, without the batch axis."""
    fields: Any = (None if field is None else field[index] for field in batch)
    return Batch(*fields)


def joined(batches: list[Batch], at: list[np.ndarray]) -> Batch:
    """One batch of all rows; at[k] i64[rows of batch k]: where they come to stand."""
    if len(batches) == 1 and np.array_equal(at[0], np.arange(len(at[0]))):
        return batches[0]
    order = np.argsort(np.concatenate(at))
    fields: Any = (None if field[0] is None else np.concatenate(field)[order] for field in zip(*batches, strict=True))
    return Batch(*fields)


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

    def parts(self) -> Sequence["DocumentStream"]:
        """Streams that together have the documents of this one, and can be read apart; or this one."""
