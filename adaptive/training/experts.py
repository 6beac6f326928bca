"""What the experts of routed feed-forwards did over an interval: columns of a row, and alarms when routing fails.

A step gives, under names "experts/NAME", sums over its tokens for every call of a routed layer in the order they ran
(adaptive/layers/moe/base.py, `statistics`). They are added up over the interval, never sampled: one step may be a
transient. All here is numpy on the host.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.models.config import TransformerConfig

PREFIX, BY_LAYER = "experts/", "experts/by_layer/"
Row = dict[str, Any]

# A router's own sums: name -> (column, what it is divided by).
_SHARES = {
    "reused": ("reuse", "reusable"),
    "quantile": ("threshold", "quantiles"),
    "big": ("big_share", "tokens"),
    "overflow": ("overflow_share", "tokens"),
    "learners": ("learners", "tokens"),
    "zero_dropped": ("zero_dropped_per_token", "tokens"),
    "truncated": ("truncated_per_token", "tokens"),
}
_DENOMINATORS = {"reusable", "quantiles", "chunks_8", "chunks_64"}
_COMMON = ("calls", "tokens", "claimed", "kept", "experts_per_token", "dropped", "lost", "z", "entropy", "top")


def routed_layers(config: TransformerConfig) -> tuple[int, ...]:
    """Numbers, from 0 in the unrolled network, of the layers whose feed-forwards are routed, in the order they run."""
    if config.moe.router == "none":
        return ()
    return tuple(i for i in range(config.num_layers) if i not in config.moe.dense_layers)


class ExpertSums:
    """Adds up the sums of several steps; `layers` numbers their calls, () from 0."""

    def __init__(self, layers: Sequence[int] = ()):
        self._layers = tuple(layers)
        self.clear()

    def clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A step's metrics, of which those named "experts/..." are used: f32[calls, ...] each."""
        for name, value in metrics.items():
            if name.startswith(PREFIX):
                short = name.removeprefix(PREFIX)
                self._sums[short] = self._sums.get(short, 0.0) + np.asarray(value, np.float64)

    def columns(self) -> Row:
        """Columns of a row, listed in adaptive/training/metrics.py; {} where nothing was routed."""
        if not self._sums:
            return {}
        s, calls = self._sums, len(self._sums["tokens"])
        ran = s["tokens"] > 0
        layers = _measures(s)
        row: Row = {f"{PREFIX}{name}": _mean(values) for name, values in layers.items()}
        row[f"{BY_LAYER}layer"] = list(self._layers) if len(self._layers) == calls else list(range(calls))
        row |= {f"{BY_LAYER}{name}": [_rounded(v) for v in values] for name, values in layers.items()}
        row[f"{BY_LAYER}experts_per_token"] = _histograms(s["experts_per_token"])
        load = _true_claims(s)
        decimals = 3 + len(str(load.shape[1]))  # a thousandth of the fair share, or finer
        shares = np.round(load / np.maximum(load.sum(-1, keepdims=True), 1.0), decimals)
        row[f"{PREFIX}load"] = [share.tolist() if there else None for share, there in zip(shares, ran, strict=True)]
        return row


def scalar_columns(row: Mapping[str, Any]) -> Row:
    """A row's scalars, each layer's under a name of its own: "experts/by_layer/NAME" as "experts/layer_3/NAME"."""
    out: Row = {}
    for name, value in row.items():
        if not isinstance(value, list):
            out[name] = value
            continue
        place, found, short = name.partition(BY_LAYER)
        if found and short not in ("layer", "experts_per_token"):
            numbers = row[f"{place}{BY_LAYER}layer"]
            out |= {f"{place}{PREFIX}layer_{i}/{short}": v for i, v in zip(numbers, value, strict=True)}
    return out


def _measures(s: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each measure f64[calls], NaN where a call had no tokens."""
    load, tokens = _true_claims(s), np.where(s["tokens"] > 0, s["tokens"], math.nan)
    experts, wanted = load.shape[1], load.sum(-1)
    mean = np.where(wanted > 0, wanted / experts, math.nan)
    share = load / (experts * mean[:, None])
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    empty = np.where(np.isnan(tokens), math.nan, (load == 0).sum(-1))
    pairs = np.where(np.isnan(tokens), math.nan, np.maximum(wanted, 1.0))
    out = {
        "load_max_over_mean": load.max(-1) / mean,
        "load_min_over_mean": load.min(-1) / mean,
        "load_std_over_mean": load.std(-1) / mean,
        "load_entropy": entropy,
        "load_entropy_normalised": entropy / math.log(experts) if experts > 1 else entropy + 1.0,
        "empty": empty,
        "empty_fraction": empty / experts,
        "dropped_fraction": s["dropped"] / pairs,
        "lost_fraction": s.get("lost", np.zeros_like(wanted)) / pairs,
        "per_token": s["kept"].sum(-1) / tokens,
        "without_expert": s["experts_per_token"][:, 0] / tokens,
        "router_z": s["z"] / tokens,
        "router_entropy": s["entropy"] / tokens,
        "top_probability": s["top"] / tokens,
    }
    if s["claimed"].shape[1] > experts:
        claims = s["claimed"].sum(-1)
        out["zero_share"] = np.where(claims > 0, 1 - wanted / np.maximum(claims, 1.0), math.nan)
    return out | {name: np.where(np.isnan(tokens), math.nan, values) for name, values in _own_measures(s).items()}


def _own_measures(s: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """f64[calls] of a router's own sums: shares of what they count, otherwise means per call."""
    out, per = {}, lambda count: np.maximum(count, 1.0)
    for name in sorted(set(s) - set(_COMMON) - _DENOMINATORS):
        if name == "loops":  # tokens by their number of passes
            out[name] = s[name] @ np.arange(1, s[name].shape[1] + 1) / per(s["tokens"])
        elif name.startswith(
            "touched_"
        ):  # chunk-level sparsity (BlockFFN paper): experts that no token of a chunk uses
            length = name.removeprefix("touched_")
            out[f"cls_{length}"] = 1 - s[name] / per(s[f"chunks_{length}"] * s["claimed"].shape[1])
        else:
            column, over = _SHARES.get(name, (name, "calls"))
            out[column] = s[name].reshape(len(s[name]), -1).mean(-1) / per(s[over])
    return out


def _true_claims(s: Mapping[str, np.ndarray]) -> np.ndarray:
    """f64[calls, experts]: pairs that the router wanted. Before drops, because full experts all look alike."""
    return s["claimed"][:, : s["kept"].shape[1]]


def _histograms(counts: np.ndarray) -> list[list[float]]:
    """Shares of tokens by their number of experts, up to the largest number that any layer has."""
    used = np.flatnonzero(counts.sum(0))
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1.0)
    return np.round(shares[:, : (used[-1] if used.size else 0) + 1], 5).tolist()


def _mean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else math.nan


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
