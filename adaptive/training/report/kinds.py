"""Which kinds of tokens go deep: by what they are, how frequent they are, and how hard what follows them is."""

import itertools
from collections.abc import Callable

import numpy as np

from adaptive.data.token_kinds import CLASSES, DIGITS, LETTERS, OPENING, OTHER
from adaptive.training.report.schema import KindRecord

_LOSSES = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats: edges of the groups
_QUARTERS = ("most frequent quarter", "second quarter", "third quarter", "rarest quarter")


def begins_word(classes: np.ndarray) -> np.ndarray:
    """bool[batch, seq]: tokens at which a word begins, given the class of each: letters, digits and what is beyond
    ASCII after anything else. The first of a row is none, since what precedes it is not known."""
    inside = np.isin(classes, (LETTERS, DIGITS, OTHER))
    begins = inside & ~np.roll(np.isin(classes, (OPENING, LETTERS, DIGITS, OTHER)), 1, axis=1)
    begins[:, 0] = False
    return begins | (classes == OPENING)


class KindCounter:
    """Depths over held-out batches, by kind of token.

    classes  i8[vocab], from `classes_of`
    """

    def __init__(self, classes: np.ndarray):
        self._classes = classes
        self._of_token = np.zeros((2, len(classes)))  # tokens and passes of each id
        self._of_loss = np.zeros((2, len(_LOSSES) + 1))

    def add(self, tokens: np.ndarray, depth: np.ndarray, nll: np.ndarray, present: np.ndarray) -> None:
        """One batch [batch, seq]: ids, passes, nats of the token that follows, and what exists. The last of a row is
        left out: what follows it may not be there."""
        here = present.copy()
        here[:, -1] = False
        ids, passes = tokens[here], depth[here]
        for sums, groups in ((self._of_token, ids), (self._of_loss, np.searchsorted(_LOSSES, nll[here], "right"))):
            sums[0] += np.bincount(groups, minlength=sums.shape[1])[: sums.shape[1]]
            sums[1] += np.bincount(groups, passes, minlength=sums.shape[1])[: sums.shape[1]]

    def records(self) -> tuple[KindRecord, ...]:
        """Of every group that has tokens."""
        tokens = self._of_token[0]
        if not tokens.any():
            return ()
        order = np.argsort(-tokens, kind="stable")
        quarter = np.empty(len(tokens), int)
        before = np.cumsum(tokens[order]) - tokens[order]
        quarter[order] = np.minimum(4 * before / tokens.sum(), 3).astype(int)
        edges = ["0", *(f"{edge:g}" for edge in _LOSSES)]
        losses = [f"{low} to {high}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]} or more"]
        return (
            *_records("what it is", CLASSES, lambda i: self._of_token[:, self._classes == i].sum(1)),
            *_records("how frequent it is", _QUARTERS, lambda i: self._of_token[:, quarter == i].sum(1)),
            *_records("nats of the token that follows", losses, lambda i: self._of_loss[:, i]),
        )


def _records(by: str, names: tuple[str, ...] | list[str], sums: Callable[[int], np.ndarray]) -> list[KindRecord]:
    found = ((name, *sums(i)) for i, name in enumerate(names))
    return [KindRecord(by, name, int(tokens), round(float(p / tokens), 4)) for name, tokens, p in found if tokens]
