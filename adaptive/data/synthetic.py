"""Rows made from their index: noise for benchmarks, and tasks whose difficulty is known at every token.

Ids of the tasks: 0 opens an episode, 1 asks for the answer, the rest are symbols.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from adaptive.data.batch import Batch, stack
from adaptive.errors import DataError

OPEN, ASK, FIRST_SYMBOL = 0, 1, 2
_SYMBOLS = 64  # at most; fewer in a smaller vocabulary
_SMALLEST_VOCABULARY = 16
_ROWS = 1 << 31
_HELD_OUT_ROWS = 256
_HELD_OUT_STREAM = 1  # train rows come from stream 0 of the same seed

# tokens of one episode, and the least number of sequential look-ups or steps that determine each (0: it is random)
_Episode = tuple[list[int], list[int]]


class Sample(NamedTuple):
    """One row of a task.

    tokens  i32[seq + 1]
    depth   i32[seq]   least sequential steps that determine each target from what is before it; 0: it is random
    """

    tokens: np.ndarray
    depth: np.ndarray


class SyntheticRows:
    """Random-access rows of the task `name`; only the determined targets count, all of them for `uniform`.

    Row i is a function of (seed, held_out, i). Raises DataError for an unknown task or too small a vocabulary.
    """

    def __init__(self, name: str, *, seq_len: int, vocab_size: int, seed: int, held_out: bool):
        if name not in TASKS:
            raise DataError(f"data.paths: no synthetic task is called '{name}'; there are {', '.join(TASKS)}")
        if vocab_size < _SMALLEST_VOCABULARY:
            raise DataError(f"synthetic tasks need a vocabulary of {_SMALLEST_VOCABULARY} or more, not {vocab_size}")
        self.name = name
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._stream = [seed, _HELD_OUT_STREAM if held_out else 0]
        self._count = _HELD_OUT_ROWS if held_out else _ROWS

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"SyntheticRows({self.name}, {self._stream})"

    def __getitem__(self, index: int) -> Batch:
        tokens, depth = self.sample(int(index))
        return Batch(
            tokens=tokens[:-1],
            targets=tokens[1:],
            positions=np.arange(self._seq_len, dtype=np.int32),
            segment_ids=np.ones(self._seq_len, np.int32),
            mask=np.ones(self._seq_len, np.float32) if self.name == "uniform" else (depth > 0).astype(np.float32),
        )

    def rows(self, indices: np.ndarray) -> Batch:
        """These rows as a batch."""
        return stack([self[index] for index in indices.tolist()])

    def sample(self, index: int) -> Sample:
        """The row with the depth of each target."""
        rng = np.random.default_rng([*self._stream, index])
        if self.name == "uniform":
            tokens = rng.integers(0, self._vocab_size, self._seq_len + 1, dtype=np.int32)
            return Sample(tokens, np.zeros(self._seq_len, np.int32))
        symbols = min(self._vocab_size - FIRST_SYMBOL, _SYMBOLS)
        ids: list[int] = []
        depth: list[int] = []
        while len(ids) <= self._seq_len:
            episode = _EPISODES[self.name](rng, symbols)
            ids += episode[0]
            depth += episode[1]
        size = self._seq_len + 1
        return Sample(np.array(ids[:size], np.int32), np.array(depth[1:size], np.int32))


def _draw(rng: np.random.Generator, symbols: int, count: int, *, distinct: bool = False) -> list[int]:
    return (rng.choice(symbols, count, replace=not distinct) + FIRST_SYMBOL).tolist()


def _copy(rng: np.random.Generator, symbols: int) -> _Episode:
    """Repeat a word."""
    word = _draw(rng, symbols, int(rng.integers(2, 17)))
    return [OPEN, *word, ASK, *word], [0] * (len(word) + 2) + [1] * len(word)


def _reverse(rng: np.random.Generator, symbols: int) -> _Episode:
    """Repeat a word backwards."""
    word = _draw(rng, symbols, int(rng.integers(2, 17)))
    return [OPEN, *word, ASK, *word[::-1]], [0] * (len(word) + 2) + [1] * len(word)


def _recall(rng: np.random.Generator, symbols: int) -> _Episode:
    """Given pairs of a key and a value, the value of one key (associative recall)."""
    count = int(rng.integers(2, 1 + min(16, symbols)))
    keys, values = _draw(rng, symbols, count, distinct=True), _draw(rng, symbols, count)
    asked = rng.integers(count)
    pairs = [token for pair in zip(keys, values, strict=True) for token in pair]
    return [OPEN, *pairs, ASK, keys[asked], values[asked]], [0] * (2 * count + 3) + [1]


def _chase(rng: np.random.Generator, symbols: int) -> _Episode:
    """Given a cycle as shuffled pairs (from, to), where a walk of some steps from a symbol ends (k-hop pointers).

    After ASK come the start and as many ASKs as there are steps beyond the first.
    """
    count = int(rng.integers(4, 1 + min(12, symbols)))
    cycle = _draw(rng, symbols, count, distinct=True)
    pairs = [token for i in rng.permutation(count) for token in (cycle[i], cycle[(i + 1) % count])]
    start, steps = int(rng.integers(count)), int(rng.integers(1, min(count, 5)))
    question = [ASK, cycle[start], *[ASK] * (steps - 1)]
    return [OPEN, *pairs, *question, cycle[(start + steps) % count]], [0] * (1 + 2 * count + len(question)) + [steps]


def _addition(rng: np.random.Generator, symbols: int) -> _Episode:
    """The sum of two decimal numbers modulo a power of ten, lowest digit first; depth is the carries to follow."""
    width = int(rng.integers(2, 9))
    first, second = rng.integers(0, 10, (2, width)).tolist()
    total, depth, carry, chain = [], [], 0, 0
    for a, b in zip(first, second, strict=True):
        depth.append(1 + chain)
        total.append((a + b + carry) % 10)
        # A digit sum of 9 hands on whatever comes in; any other sum decides its carry alone.
        chain = chain + 1 if a + b == 9 else 1
        carry = (a + b + carry) // 10
    tokens = [OPEN, *_digits(first), OPEN, *_digits(second), ASK, *_digits(total)]
    return tokens, [0] * (2 * width + 3) + depth


def _digits(values: list[int]) -> list[int]:
    return [FIRST_SYMBOL + value for value in values]


def _brackets(rng: np.random.Generator, symbols: int) -> _Episode:
    """Nested brackets of several kinds: a closing one must match; depth is how deep the pair it closes is nested."""
    kinds = min(symbols // 2, 8)
    tokens, depth = [OPEN], [0]
    stack: list[int] = []
    for _ in range(int(rng.integers(4, 33))):
        if stack and (len(stack) == 8 or rng.random() < 0.5):
            depth.append(len(stack))
            tokens.append(FIRST_SYMBOL + kinds + stack.pop())
        else:
            stack.append(int(rng.integers(kinds)))
            depth.append(0)
            tokens.append(FIRST_SYMBOL + stack[-1])
    while stack:
        depth.append(len(stack))
        tokens.append(FIRST_SYMBOL + kinds + stack.pop())
    return tokens, depth


_EPISODES: dict[str, Callable[[np.random.Generator, int], _Episode]] = {
    "copy": _copy,
    "reverse": _reverse,
    "recall": _recall,
    "chase": _chase,
    "addition": _addition,
    "brackets": _brackets,
}
TASKS = ("uniform", *_EPISODES)
