"""Documents laid end to end and cut into windows, as they come."""

from collections import deque
from collections.abc import Iterator

import numpy as np


class Packer:
    """Windows of seq_len + 1 tokens of documents (i32[tokens] each), each sharing one token with the next.

    taken   documents that no window needs any more; from `documents` on come those after them
    offset  the first token wanted of the next one
    """

    def __init__(self, documents: Iterator[np.ndarray], seq_len: int, taken: int = 0, offset: int = 0):
        self.taken, self.offset = taken, offset
        self._documents = documents
        self._seq_len = seq_len
        self._pieces: deque[np.ndarray] = deque()
        self._held = 0

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """i32[seq_len + 1] tokens and i64[segments] where each document or rest of one begins among them.

        The last window may be shorter; after it, StopIteration.
        """
        while self._held - self.offset < self._seq_len + 1:
            piece = next(self._documents, None)
            if piece is None:
                break
            self._pieces.append(piece)
            self._held += len(piece)
        if self._held - self.offset < 2:
            raise StopIteration
        parts, openings, length = [], [], 0
        for document in self._pieces:
            if length == self._seq_len + 1:
                break
            openings.append(length)
            parts.append(document[0 if length else self.offset :][: self._seq_len + 1 - length])
            length += len(parts[-1])
        self._advance()
        return np.concatenate(parts), np.array(openings)

    def _advance(self) -> None:
        self.offset += self._seq_len
        while self._pieces and self.offset >= len(self._pieces[0]):
            dropped = len(self._pieces.popleft())
            self.taken += 1
            self.offset -= dropped
            self._held -= dropped
