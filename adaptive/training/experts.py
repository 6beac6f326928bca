"""What the experts of routed feed-forwards did over an interval, as columns of a row.

They are made of sums over tokens for every call of a routed feed-forward (adaptive/layers/moe/base.py, `statistics`),
which `adaptive.training.parts` adds up. All here is numpy on the host.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PREFIX, BY_LAYER = "experts/", "experts/by_layer/"
Row = dict[str, Any]
Sums = Mapping[str, np.ndarray]  # f64[calls, ...] by name

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


def columns(parts: Mapping[str, Sums], experts: Sequence[Any] = ()) -> Row:
    """Columns of a row, listed in adaptive/training/metrics.py; {} where nothing was routed.

    parts    sums f64[calls, ...] of routed feed-forwards, by path
    experts  those of the model's facts; calls of parts that are not among them are numbered from 0
    """
    if not parts:
        return {}
    order = _running_order({path: len(sums["tokens"]) for path, sums in parts.items()}, experts)
    measures = {path: _measures(sums) for path, sums in parts.items()}
    names = dict.fromkeys(name for own in measures.values() for name in own)
    each = lambda own, name, call: own[name][call] if name in own else math.nan  # noqa: E731
    lists = {name: np.array([each(measures[c.part], name, c.call) for c in order]) for name in names}
    row: Row = {f"{PREFIX}{name}": _mean(values) for name, values in lists.items()}
    row[f"{BY_LAYER}layer"] = [c.layer for c in order]
    if len(parts) > 1:
        row[f"{BY_LAYER}part"] = [c.part for c in order]
    row |= {f"{BY_LAYER}{name}": [_rounded(v) for v in values] for name, values in lists.items()}
    counts = np.stack([parts[c.part]["experts_per_token"][c.call] for c in order])
    row[f"{BY_LAYER}experts_per_token"] = _histograms(counts)
    loads = {path: _shares(sums) for path, sums in parts.items()}
    row[f"{PREFIX}load"] = [loads[c.part][c.call] for c in order]
    return row


class _Call(NamedTuple):
    """One call of a routed feed-forward: its part's path, which of the part's calls, and the layer's number."""

    part: str
    call: int
    layer: int


def _running_order(calls: Mapping[str, int], experts: Sequence[Any]) -> list[_Call]:
    """All calls in the order they run, given how many each part has: blocks of one stack take turns."""
    known = {one.path: one.layers for one in experts}
    stacks: dict[str, list[_Call]] = {}
    for path in sorted(calls, key=[*known, *calls].index):
        numbers = known.get(path, ())
        numbers = numbers if len(numbers) == calls[path] else tuple(range(calls[path]))
        stacks.setdefault(_stack(path), []).extend(_Call(path, i, layer) for i, layer in enumerate(numbers))
    return [call for own in stacks.values() for call in sorted(own, key=lambda call: call.layer)]


def _stack(path: str) -> str:
    """Path of the stack that a block's part is in."""
    return path.rpartition("/blocks/")[0]


def layers_of(row: Mapping[str, Any], place: str = "") -> list[tuple[int, str]]:
    """(number, stack) of the layer of each call in a row's lists; "" for the stack where the numbers alone tell.

    place  "" in rows of training, "eval/" or "eval/threshold/" in rows of evaluations
    """
    numbers, parts = row[f"{place}{BY_LAYER}layer"], row.get(f"{place}{BY_LAYER}part")
    if parts is None or len(set(numbers)) == len(numbers):
        return [(number, "") for number in numbers]
    return [(number, _stack(part)) for number, part in zip(numbers, parts, strict=True)]


def scalar_columns(row: Mapping[str, Any]) -> Row:
    """A row's scalars, each layer's under a name of its own: "experts/by_layer/NAME" as "experts/layer_3/NAME"."""
    out: Row = {}
    for name, value in row.items():
        if not isinstance(value, list):
            out[name] = value
            continue
        place, found, short = name.partition(BY_LAYER)
        if found and short not in ("layer", "part", "experts_per_token"):
            for (number, stack), one in zip(layers_of(row, place), value, strict=True):
                out[f"{place}{PREFIX}{stack}{'/' * bool(stack)}layer_{number}/{short}"] = one
    return out


def _measures(s: Sums) -> dict[str, np.ndarray]:
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


def _own_measures(s: Sums) -> dict[str, np.ndarray]:
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


def _true_claims(s: Sums) -> np.ndarray:
    """f64[calls, experts]: pairs that the router wanted. Before drops, because full experts all look alike."""
    return s["claimed"][:, : s["kept"].shape[1]]


def _shares(s: Sums) -> list[list[float] | None]:
    """Each expert's share of a call's load, rounded to a thousandth of the fair share or finer; None without tokens."""
    load = _true_claims(s)
    decimals = 3 + len(str(load.shape[1]))
    shares = np.round(load / np.maximum(load.sum(-1, keepdims=True), 1.0), decimals)
    return [share.tolist() if there else None for share, there in zip(shares, s["tokens"] > 0, strict=True)]


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
