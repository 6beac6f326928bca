"""A judge of texts that is no neural network: how likely tokens are by counts of what followed the last few."""

import numpy as np


class NGram:
    """Interpolated counts (Witten and Bell 1991): of `order` tokens the last is predicted from the others, and what was
    seldom seen leans on shorter contexts, at last on all tokens alike.

    tokens  i32[n] to count
    vocab   of so many ids
    """

    def __init__(self, tokens: np.ndarray, vocab: int, order: int = 5):
        if vocab**order >= 2**63:
            raise ValueError(f"order {order} of {vocab} ids has more grams than 64 bits tell apart")
        self._vocab, self._order = vocab, order
        self._counts = [self._count(np.asarray(tokens, np.int64), size) for size in range(1, order + 1)]

    def _count(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        """Grams and how often each came; their contexts, how often each was followed, and by how many different ids."""
        grams, often = np.unique(self._codes(tokens, size), return_counts=True)
        contexts, at = np.unique(grams // self._vocab, return_inverse=True)
        followed = np.bincount(at, often, len(contexts))
        return grams, often, contexts, followed, np.bincount(at, minlength=len(contexts))

    def _codes(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """i64[n - size + 1]: every run of `size` tokens as one number."""
        n = len(tokens) - size + 1
        codes = np.zeros(max(n, 0), np.int64)
        for i in range(size):
            codes = codes * self._vocab + tokens[i : i + n]
        return codes

    def nats(self, tokens: np.ndarray, begin: int = 0) -> np.ndarray:
        """f64[n - begin]: -log p of tokens i32[n] from `begin` on, each given those before it."""
        tokens = np.asarray(tokens, np.int64)
        chance = np.full(len(tokens), 1.0 / self._vocab)
        for size, (grams, often, contexts, followed, different) in enumerate(self._counts, 1):
            codes = self._codes(tokens, size)
            times, all_times = _found(grams, often, codes), _found(contexts, followed, codes // self._vocab)
            kinds = _found(contexts, different, codes // self._vocab)
            here = chance[size - 1 :]
            known = all_times > 0
            mixed = (times + kinds * here) / np.where(known, all_times + kinds, 1)
            chance[size - 1 :] = np.where(known, mixed, here)
        return -np.log(chance[begin:])


def _found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """f64: values of sorted keys, 0 of what is none of them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)
