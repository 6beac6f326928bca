"""Held-out documents and windows of tokens, both as functions of an index: no packing state exists.

stream    the documents of one split, end to end
window w  tokens [w T, w T + S + 1) of the stream: S inputs and, one further, S targets. The stride T is S, and windows
          share one token; with a smaller one, S - T targets that the window before had are not counted again
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from adaptive.data.batch import Batch, make_rows, row_of
from adaptive.data.store import TokenStore


class Split:
    """The training or the held-out part of a store as one stream of tokens.

    Document i is held out when i % every == every - 1. A store of fewer than `every` documents has no such document:
    then the last 1/every of its tokens is held out, whatever document they are in. every = 0 holds nothing out.
    """

    def __init__(self, store: TokenStore, which: Literal["train", "validation"], every: int):
        bounds = store.documents
        held_out = which == "validation"
        self.store = store
        if every and len(bounds) <= every:
            self.rule = f"the last 1/{every} of the tokens, as there are fewer than {every} documents"
            bounds, keep = _cut_tail(bounds, len(store) - len(store) // every, held_out)
        else:
            self.rule = f"every {every}th document" if every else "nothing"
            chosen = np.arange(len(bounds) - 1) % max(every, 1) == every - 1
            keep = chosen if held_out else ~chosen
        lengths = np.diff(bounds)[keep]
        self.documents = np.concatenate([[0], np.cumsum(lengths)])  # i64[documents + 1], in tokens of the stream
        # Runs of neighbouring documents are contiguous in the store and read at once.
        run_starts = np.flatnonzero(keep & ~np.concatenate([[False], keep[:-1]]))
        self._physical = bounds[:-1][run_starts]
        self._logical = np.concatenate([[0], np.cumsum(np.diff(bounds) * keep)])[run_starts]
        self._shift = self._physical - self._logical

    def __len__(self) -> int:
        return int(self.documents[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """i32[stop - start] tokens of the stream."""
        tokens = np.empty((1, stop - start), np.int32)
        self.read_rows(np.array([start]), np.array([stop]), tokens)
        return tokens[0]

    def read_rows(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> None:
        """Puts tokens starts[i] to stops[i] of the stream at the beginning of row i of `out` i32[rows, length]."""
        first, last = (np.searchsorted(self._logical, at, side="right") - 1 for at in (starts, stops - 1))
        begins = (starts + self._shift[first]).tolist()
        whole = (first == last).tolist()
        for i, (begin, length) in enumerate(zip(begins, (stops - starts).tolist(), strict=True)):
            if whole[i]:
                self.store.read_into(out[i, :length], begin)
                continue
            filled = 0
            for part in self._stored(int(starts[i]), int(stops[i])):
                size = part[1] - part[0]
                self.store.read_into(out[i, filled : filled + size], part[0])
                filled += size

    def predicted(self, start: int, stop: int) -> np.ndarray:
        """bool[stop - start]: whether each of these tokens belongs to no prompt."""
        return np.concatenate([self.store.predicted(*part) for part in self._stored(start, stop)])

    def _stored(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where in the store these tokens are."""
        first, last = np.searchsorted(self._logical, [start, stop - 1], side="right") - 1
        for run in range(first, last + 1):
            begin = max(start, self._logical[run])
            end = stop if run == last else self._logical[run + 1]
            yield int(begin + self._shift[run]), int(end + self._shift[run])


class Windows:
    """Windows of a split, as a random-access source of Batch rows without the batch axis.

    seq_len         S, the inputs of a window
    partial         keep the last, shorter window, padded with segment 0; otherwise its tokens are dropped
    cross_document  ignore document boundaries: one segment, positions 0 to S - 1, every target counts
    filler          the token that padding holds
    stride          tokens from one window to the next, at most seq_len: each target counts once, in the first window
                    that has it, so that all but those of the first have at least seq_len - stride tokens before them
                    in their row; 0: seq_len
    """

    def __init__(
        self, split: Split, seq_len: int, *, partial: bool, cross_document: bool, filler: int, stride: int = 0
    ):
        self._stride = stride or seq_len
        predictions = max(len(split) - 1 - (seq_len - self._stride), min(len(split) - 1, 1), 0)
        self._split = split
        self._seq_len = seq_len
        self._cross_document = cross_document
        self._filler = filler
        self._count = -(-predictions // self._stride) if partial else predictions // self._stride

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Windows({self._split.store.name}, {self._count} of {self._seq_len})"

    def __getitem__(self, index: int) -> Batch:
        return row_of(self.rows(np.array([index])), 0)

    def rows(self, indices: np.ndarray) -> Batch:
        """These windows (i64[rows]) as a batch, made together: what costs is not the row but the token."""
        starts = indices.astype(np.int64) * self._stride
        stops = np.minimum(starts + self._seq_len + 1, len(self._split))
        tokens = np.full((len(indices), self._seq_len + 1), self._filler, np.int32)
        self._split.read_rows(starts, stops, tokens)
        batch = make_rows(tokens, stops - starts, *self._openings(starts, stops))
        if self._split.store.prompts is None and self._stride == self._seq_len:
            return batch
        for row, index in enumerate(indices.tolist()):
            again = self._seq_len - self._stride if index else 0
            batch.mask[row, :again] = 0
            start, stop = int(starts[row]), int(stops[row])
            batch.mask[row, : stop - start - 1] *= self._split.predicted(start + 1, stop)
        return batch

    def _openings(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin within the windows: i64[documents] the row, and the place in it."""
        if self._cross_document:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        bounds = self._split.documents
        first, end = np.searchsorted(bounds, starts, side="right"), np.searchsorted(bounds, stops, side="left")
        counts = end - first
        row = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return row, bounds[first[row] + within] - starts[row]

    def documents(self, index: int) -> np.ndarray:
        """i64[seq_len]: the document of the split that each target of a window belongs to, whether it counts or not."""
        targets = int(index) * self._stride + 1 + np.arange(self._seq_len)
        return np.searchsorted(self._split.documents, targets, side="right") - 1


def _cut_tail(bounds: np.ndarray, cut: int, tail: bool) -> tuple[np.ndarray, np.ndarray]:
    """Document bounds with one more at `cut`, and which of the pieces are wanted."""
    bounds = np.unique(np.append(bounds, cut))
    return bounds, (bounds[:-1] >= cut) == tail
