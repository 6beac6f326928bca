"""Beginnings of prompts whose state is kept for prompts that begin alike.

A state is kept behind whole pieces alone, and prompts are read in the same pieces with it or without: what is computed
is the same to the last bit, whatever was asked before.
"""

import collections
import hashlib
from collections.abc import Iterator

import numpy as np

MET = 4096  # beginnings that are remembered without their state


class Prefixes:
    """Which beginnings of prompts are kept in which of so many places; one is kept when it comes for the second time,
    in place of that used longest ago.

    piece  tokens that are read at once
    """

    def __init__(self, places: int, piece: int):
        self._piece = piece
        self._free = list(range(places))
        self._kept: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._met: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    def find(self, tokens: np.ndarray) -> tuple[int, int] | None:
        """(place, tokens) of the longest beginning that is kept and leaves something to read."""
        best = None
        for length, name in self._beginnings(tokens):
            if name in self._kept:
                best = length, name
        if best is None:
            return None
        self._kept.move_to_end(best[1])
        return self._kept[best[1]], best[0]

    def keep(self, tokens: np.ndarray, read: int) -> int | None:
        """The place for the state behind the first `read` tokens; None: it is not to be kept."""
        if not read or read % self._piece or read >= len(tokens):
            return None
        name = _name(tokens[:read])
        if name in self._kept:
            return None
        if name not in self._met:
            self._met[name] = None
            if len(self._met) > MET:
                self._met.popitem(last=False)
            return None
        if not self._free and not self._kept:
            return None
        self._kept[name] = self._free.pop() if self._free else self._kept.popitem(last=False)[1]
        return self._kept[name]

    def _beginnings(self, tokens: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for length in range(self._piece, len(tokens), self._piece):
            yield length, _name(tokens[:length])


def _name(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).digest()
