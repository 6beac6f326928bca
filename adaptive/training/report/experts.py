"""Which experts did the work, as HTML; "" where nothing was routed to experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive.data.token_kinds import CLASSES
from adaptive.printable import printable
from adaptive.training.experts import BY_LAYER, PREFIX, layers_of
from adaptive.training.report.bars import bar_chart
from adaptive.training.report.charts import Point, Series, line_chart
from adaptive.training.report.heat import heat_map
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.numbers import percent
from adaptive.training.report.runs import Run
from adaptive.training.report.schema import ExpertRecord
from adaptive.training.report.svg import element

_HELD_OUT = {"eval/": "held-out", "eval/threshold/": "held-out, causal"}
_TABLE = (
    ("max / mean load", "load_max_over_mean", lambda v: f"{v:.2f}"),
    ("empty experts", "empty", lambda v: f"{v:.0f}"),
    ("pairs dropped", "dropped_fraction", percent),
    ("experts per token", "per_token", lambda v: f"{v:.2f}"),
    ("tokens without one", "without_expert", percent),
    ("top probability", "top_probability", percent),
    ("router z", "router_z", lambda v: f"{v:.2f}"),
)


def experts(run: Run) -> str:
    newest = next((row for row in reversed(run.training) if f"{PREFIX}load" in row), None)
    if newest is None:
        return ""
    causal = next((row for row in reversed(run.evaluations) if f"eval/threshold/{PREFIX}load" in row), {})
    maps = [
        heat_map(f"Load at step {newest['step']:,}", _loads(run, newest, ""), "in training, over the last interval")
    ]
    if causal:
        title = f"Load on held-out text at step {causal['step']:,}"
        maps.append(heat_map(title, _loads(run, causal, "eval/threshold/"), "chosen causally, as in generation"))
    return section(
        "Which experts did the work",
        grid(*maps, columns="one"),
        grid(_imbalance(run), _failures(run), _per_token(run), _histogram(newest), _certainty(run), _router_z(run)),
        *_taken(run),
        element("details", element("summary", f"Layer by layer at step {newest['step']:,}") + _layers(run, newest)),
        lead="Load: the pairs of a token and an expert that the router wants, before any is dropped. 1 is the fair "
        "share, the same for all experts of a layer; an expert far below it hardly learns, one far above it is what "
        "the others wait for.",
    )


def _taken(run: Run) -> list[str]:
    """What experts of the first, a middle and the last layer took of the held-out text, and the tokens of all."""
    layers: dict[tuple[str, int], list[ExpertRecord]] = {}
    for record in run.routing.experts:
        layers.setdefault((record.part, record.layer), []).append(record)
    if not layers:
        return []
    keys = list(layers)
    shown = dict.fromkeys((keys[0], keys[len(keys) // 2], keys[-1]))
    several = len({part for part, _ in keys}) > 1
    name = lambda key: f"layer {key[1]}" + (f" of {key[0]}" if several else "")  # noqa: E731
    note = "share of a kind's tokens over the expert's share of all; counted where it is a token's strongest expert"
    maps = [heat_map(f"What experts of {name(key)} take", _lift(layers[key]), note) for key in shown]
    lines = [("layer", "expert", "share of tokens", "tokens that it has more often than others do")]
    for key, records in layers.items():
        total = max(1, sum(sum(record.counts) for record in records))
        for record in records:
            top = "  ".join(_visible(text) for text in record.top)
            lines.append((name(key), str(record.expert), percent(sum(record.counts) / total), top or "—"))
    details = element("summary", "The tokens of every expert") + table(lines, kind="compare")
    return [element("h3", "What experts take"), grid(*maps, columns="one"), element("details", details)]


def _lift(records: Sequence[ExpertRecord]) -> list[tuple[str, list[float] | None]]:
    """Of every kind of token that there is, over the experts: P(expert | kind) / P(expert)."""
    total = sum(sum(record.counts) for record in records)
    rows: list[tuple[str, list[float] | None]] = []
    for i, kind in enumerate(CLASSES):
        of_kind = sum(record.counts[i] for record in records)
        if of_kind:
            share = [sum(record.counts) / total for record in records]
            rows.append((kind, [r.counts[i] / of_kind / s if s else 0.0 for r, s in zip(records, share, strict=True)]))
    return rows


def _visible(text: str) -> str:
    return printable(text).replace("\n", "\u21b5").replace(" ", "\u2423") or "\u220e"


def layer_names(run: Run, row: Mapping[str, Any], place: str = "") -> list[str]:
    """Of each call in a row's lists: its layer in the unrolled network, its stack where there are several, and the
    recursion where a block is used several times."""
    parts = row.get(f"{place}{BY_LAYER}part")
    passes = _passes(run)
    names = []
    for i, (number, stack) in enumerate(layers_of(row, place)):
        part = parts[i] if parts else next(iter(passes), ("", 0))[0]
        found = passes.get((part, number))
        names.append(
            f"layer {number}"
            + (f" of {stack}" if stack else "")
            + (f", recursion {found}" if found is not None else "")
        )
    return names


def _passes(run: Run) -> dict[tuple[str, int], int | None]:
    """(part, layer) of every call of a routed feed-forward -> its recursion, from 1; None outside of one."""
    found: dict[tuple[str, int], int | None] = {}
    for one in run.experts:
        inside = run.facts.recursions > 1 and one.setting.startswith(f"{run.facts.recursion}.core.")
        each = len(one.layers) // run.facts.recursions
        found |= {(one.path, layer): i // each + 1 if inside else None for i, layer in enumerate(one.layers)}
    return found


def _loads(run: Run, row: Mapping[str, Any], place: str) -> list[tuple[str, list[float] | None]]:
    load = row[f"{place}{PREFIX}load"]
    return [
        (name, shares and [share * len(shares) for share in shares])
        for name, shares in zip(layer_names(run, row, place), load, strict=True)
    ]


def _both(run: Run, name: str) -> list[Series]:
    """A measure in training and on held-out text."""
    found = [Series("training", smooth(run.points(f"{PREFIX}{name}", "tokens")), 1)]
    for i, (place, label) in enumerate(_HELD_OUT.items()):
        found.append(Series(label, run.points(f"{place}{PREFIX}{name}", "tokens"), 2 + i, "dots"))
    return found


def _imbalance(run: Run) -> str:
    worst = Series("worst layer", smooth(_worst(run, "load_max_over_mean")), 5, "dashed")
    return line_chart(
        "Load imbalance", [*_both(run, "load_max_over_mean"), worst], x="tokens", y="busiest expert over the mean",
        y_range=(1.0, None), note="mean over layers; 1 is perfect balance",
    )  # fmt: skip


def _worst(run: Run, name: str) -> list[Point]:
    rows = [row for row in run.training if f"{BY_LAYER}{name}" in row and row.get("tokens") is not None]
    highest = ((row["tokens"], [v for v in row[f"{BY_LAYER}{name}"] if v is not None]) for row in rows)
    return [(float(at), max(values)) for at, values in highest if values]


def _failures(run: Run) -> str:
    measures = (
        ("tokens without an expert", "without_expert", True),
        ("pairs dropped", "dropped_fraction", True),
        ("experts without a token", "empty_fraction", True),
        ("pairs lost between devices", "lost_fraction", False),
    )
    series = []
    for i, (label, name, always) in enumerate(measures):
        points = run.points(f"{PREFIX}{name}", "tokens")
        if always or any(y for _, y in points):
            series.append(Series(label, smooth(points), 1 + i))
    return line_chart("Left out", series, x="tokens", y="share", y_range=(0, None), percent=True)


def _per_token(run: Run) -> str:
    return line_chart(
        "Experts per token", _both(run, "per_token"), x="tokens", y="experts that compute a token", y_range=(0, None)
    )  # fmt: skip


def _certainty(run: Run) -> str:
    zero = Series("chose no true expert", smooth(run.points(f"{PREFIX}zero_share", "tokens")), 5, "dashed")
    return line_chart(
        "Certainty of the router", [*_both(run, "top_probability"), zero], x="tokens", y="largest probability",
        y_range=(0, None), percent=True, note="mean over tokens and layers",
    )  # fmt: skip


def _router_z(run: Run) -> str:
    return line_chart(
        "Size of the router's logits", _both(run, "router_z"), x="tokens", y="mean of logsumexp squared",
        y_range=(0, None),
    )  # fmt: skip


def _histogram(row: Mapping[str, Any]) -> str:
    layers = [shares for shares in row[f"{BY_LAYER}experts_per_token"] if any(shares)]
    if not layers:
        return ""
    means = [sum(column) / len(layers) for column in zip(*layers, strict=True)]
    name = lambda n: f"{n} expert{'s' * (n != 1)}" + (" or more" if n == 16 else "")  # noqa: E731
    bars = [(name(n), share, percent(share)) for n, share in enumerate(means)]
    return bar_chart("Experts of a token", bars, note=f"all layers, over the interval before step {row['step']:,}")


def _layers(run: Run, row: Mapping[str, Any]) -> str:
    lines: list[tuple[str, ...]] = [("", *(title for title, _, _ in _TABLE))]
    for i, layer in enumerate(layer_names(run, row)):
        values = ((row.get(f"{BY_LAYER}{name}", {})[i], form) for _, name, form in _TABLE)
        lines.append((layer, *("—" if v is None else form(v) for v, form in values)))
    return table(lines, kind="compare")
