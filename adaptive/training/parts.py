"""What the parts of a model told over an interval, as columns of a row.

A step gives, under names "told/PATH:NAME", sums over its tokens for every call of the part at that path
(`adaptive.training.step.told_metrics`). They are added up over the interval, never sampled: one step may be a
transient. All here is numpy on the host.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.training.experts import columns as expert_columns

PREFIX = "told/"
KEYS = "keys/"
Row = dict[str, Any]
Sums = dict[str, np.ndarray]


class PartSums:
    """Adds up the sums of several steps; `experts` are those of the model's facts."""

    def __init__(self, experts: Sequence[Any] = ()):
        self._experts = tuple(experts)
        self.clear()

    def clear(self) -> None:
        self._parts: dict[str, Sums] = {}
        self._steps = 0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A step's metrics, of which those named "told/PATH:NAME" are used: f32[calls, ...] each."""
        self._steps += 1
        for name, value in metrics.items():
            if name.startswith(PREFIX):
                path, _, short = name.removeprefix(PREFIX).rpartition(":")
                part = self._parts.setdefault(path, {})
                part[short] = part.get(short, 0.0) + np.asarray(value, np.float64)

    def columns(self) -> Row:
        """Columns of a row, listed in adaptive/training/metrics.py; {} where nothing was told."""
        routed = {path: sums for path, sums in self._parts.items() if "claimed" in sums}
        others = {path: sums for path, sums in self._parts.items() if path not in routed}
        return expert_columns(routed, self._experts) | _keys(others) | self._plain(others)

    def _plain(self, parts: Mapping[str, Sums]) -> Row:
        """The mean over calls of every sum that is a scalar for each call."""
        row: Row = {}
        for path, sums in parts.items():
            for name, value in sums.items():
                if value.ndim == 1 and name not in ("calls", "queries", "keys"):
                    calls = sums["calls"].sum() if "calls" in sums else self._steps * len(value)
                    row[f"{PREFIX}{path}/{name}"] = float(value.sum() / calls)
        return row


def _keys(parts: Mapping[str, Sums]) -> Row:
    """Keys that a query reads, of every part that tells its queries and keys, and of all together."""
    reading = {path: sums for path, sums in parts.items() if {"queries", "keys"} <= set(sums)}
    if not reading:
        return {}
    pairs = {path: (float(sums["keys"].sum()), float(sums["queries"].sum())) for path, sums in reading.items()}
    keys, queries = (sum(column) for column in zip(*pairs.values(), strict=True))
    each = {f"{KEYS}{path}": keys / max(queries, 1.0) for path, (keys, queries) in pairs.items()}
    return each | {"keys_attended": keys / max(queries, 1.0)}
