"""Which tokens an expert takes: by what they are, and the ones that it has more often than others do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.data.token_kinds import CLASSES
from adaptive.training.report.schema import ExpertRecord

_MOST_COUNTS = 4_000_000  # of single tokens; larger vocabularies and models are told by kinds alone
_TOP = 6  # tokens of an expert that are named


class TakenCounter:
    """Counts, over held-out batches, the tokens whose strongest expert is each.

    classes  i8[vocab], from `token_kinds.classes_of`
    experts  those of the model's facts
    """

    def __init__(self, classes: np.ndarray, experts: Sequence[Any]):
        self._classes = classes
        self._parts = {one.path: one for one in experts}
        self._by_class: dict[str, np.ndarray] = {}  # [calls, experts, classes]
        self._by_token: dict[str, np.ndarray] = {}  # [calls, experts, vocab]

    def add(self, strongest: Mapping[str, np.ndarray], tokens: np.ndarray, present: np.ndarray) -> None:
        """One batch: i16[calls, batch, seq] by part, and i32, bool[batch, seq] of the tokens."""
        for path, chosen in strongest.items():
            if (one := self._parts.get(path)) is None:
                continue
            experts = one.settings.experts
            by_class = _counts(chosen, self._classes[tokens], present, experts, len(CLASSES))
            self._by_class[path] = self._by_class.get(path, 0) + by_class
            if len(chosen) * experts * len(self._classes) <= _MOST_COUNTS:
                by_token = _counts(chosen, tokens, present, experts, len(self._classes))
                self._by_token[path] = self._by_token.get(path, 0) + by_token

    def records(self, text: Callable[[int], str]) -> tuple[ExpertRecord, ...]:
        """Of every expert of every layer that took tokens; text: how a token is shown."""
        found = []
        for path, one in self._parts.items():
            if path not in self._by_class:
                continue
            by_class, by_token = self._by_class[path], self._by_token.get(path)
            numbers = one.layers if len(one.layers) == len(by_class) else range(len(by_class))
            for call, layer in enumerate(numbers):
                for expert, counts in enumerate(by_class[call].astype(int).tolist()):
                    top = () if by_token is None else tuple(map(text, _typical(by_token[call], expert)))
                    found.append(ExpertRecord(path, layer, expert, tuple(counts), top))
        return tuple(found)


def _counts(chosen: np.ndarray, group: np.ndarray, present: np.ndarray, experts: int, groups: int) -> np.ndarray:
    """f64[calls, experts, groups]: tokens [batch, seq] of each group whose strongest expert is each."""
    counts = np.zeros((len(chosen), experts, groups))
    for call, own in enumerate(chosen):
        here = present & (own >= 0)
        np.add.at(counts[call], (own[here], group[here]), 1)
    return counts


def _typical(counts: np.ndarray, expert: int) -> list[int]:
    """The tokens that tell an expert most from the others: by n log(share of the expert's / share of all)."""
    own, all_of = counts[expert], counts.sum(0)
    if not own.any():
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(own > 0, own * np.log((own / own.sum()) / (all_of / all_of.sum())), 0.0)
    return [int(t) for t in np.argsort(-gain, kind="stable")[:_TOP] if gain[t] > 0]
