"""Which row of which source each sequence of a run is: a function of the seed and the index."""

import sys
from collections.abc import Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

_ROUNDS = 4  # of the cipher that permutes the rows of an epoch


class Order:
    """The rows of several sources, each shuffled as a whole and anew in each epoch, mixed by weight.

    lengths  rows of each source
    weights  proportions of sequences
    seed     None: rows in order
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int | None):
        self._lengths = list(lengths)
        # As grain's `.seed(seed + i).shuffle()` has them: saved positions are in that order.
        self._seeds = (
            None
            if seed is None
            else [int(np.random.SeedSequence([seed + i, 1]).generate_state(1)[0]) for i in range(len(lengths))]
        )
        drawn = [grain.MapDataset.source(_Drawn(i)) for i in range(len(lengths))]
        self._mixed = drawn[0] if len(drawn) == 1 else grain.MapDataset.mix(drawn, weights=weights)

    def rows(self, sequences: range) -> tuple[np.ndarray, np.ndarray]:
        """i64[sequences] the source, and i64[sequences] the row in it, of each of these sequences."""
        if len(self._lengths) == 1:
            rows = [self._row(0, i) for i in sequences]
            return np.zeros(len(rows), np.int64), np.array(rows, np.int64)
        drawn = [self._mixed[i] for i in sequences]
        rows = [self._row(source, number) for source, number in drawn]
        return np.array([source for source, _ in drawn], np.int64), np.array(rows, np.int64)

    def _row(self, source: int, number: int) -> int:
        """The row that a source gives when `number` rows were drawn from it before."""
        length = self._lengths[source]
        epoch, row = divmod(number, length)
        if self._seeds is None:
            return row
        return index_shuffle(row, max_index=length - 1, seed=(self._seeds[source] + epoch) % 2**32, rounds=_ROUNDS)


class _Drawn:
    """What grain mixes: element i of source k is (k, i)."""

    def __init__(self, source: int):
        self._source = source

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> tuple[int, int]:
        return self._source, int(number)

    def __repr__(self) -> str:
        return f"rows of source {self._source}"
