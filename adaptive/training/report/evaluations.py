"""What `adaptive evaluate` found about a run, as HTML; "" where it was not asked."""

import html
from typing import Any

from adaptive.evaluation.files import read_all
from adaptive.evaluation.table import measured, signed
from adaptive.training.report.charts import COLOURS, Series, line_chart
from adaptive.training.report.layout import grid, section, table
from adaptive.training.report.numbers import percent
from adaptive.training.report.runs import Run
from adaptive.training.report.svg import element

_RULES = {"train": "as trained", "causal": "causal"}


def evaluations(run: Run) -> str:
    """Every evaluation that is kept beside the checkpoints, the newest first."""
    parts = [_evaluation(name, told) for name, told in reversed(read_all(run.path).items())]
    lead = "Of checkpoints, by adaptive evaluate. Brackets hold 95 % of the bootstraps; a causal selection is that of "
    return section("Evaluations", *parts, lead=f"{lead}generation." if parts else "") + _while_training(run)


def _while_training(run: Run) -> str:
    """Sets and tasks that the recipe names, over the run."""
    found = [name.split("/", 3) for name in run.last_evaluation if name.startswith(("eval/sets/", "eval/tasks/"))]

    def chart(title: str, kind: str, measure: str, y: str) -> str:
        names = [name for _, own, name, column in found if (own, column) == (kind, measure)]
        lines = [
            Series(name, run.points(f"eval/{kind}/{name}/{measure}", "tokens"), 1 + i % COLOURS, "dots")
            for i, name in enumerate(names)
        ]
        return line_chart(title, lines, x="tokens", y=y)

    figures = (
        chart("Sets while training", "sets", "bits_per_byte", "bits per byte of text"),
        chart("Tasks while training", "tasks", "centred", "right above chance"),
    )
    return section("Sets and tasks", grid(*figures))


def _evaluation(name: str, told: dict[str, Any]) -> str:
    try:
        parts = (_sets(told), _curves(told), _caches(told), _tasks(told))
    except (KeyError, TypeError, ValueError, AttributeError):
        return element("p", html.escape(f"{name}.json is no evaluation that can be read"), kind="lead")
    title = f"{name}: step {told.get('step', '?')}" + (", running average" if told.get("ema") else "")
    return element("h3", html.escape(title)) + "".join(parts)


def _sets(told: dict[str, Any]) -> str:
    if not told.get("sets"):
        return ""
    rows = [("set", "selection", "tokens", "nats per token", "bits per byte", "top-1", "calibration error")]
    for name, rules in told["sets"].items():
        for rule, one in rules.items():
            rows.append(
                (name, _RULES[rule], f"{one['targets']:,}", measured(one, "loss"), measured(one, "bits_per_byte"),
                 percent(one["accuracy"]), f"{one['calibration']['error']:.3f}" if "calibration" in one else "")
            )  # fmt: skip
    if len(told["sets"]) > 1:
        rows += [
            ("mean of sets", _RULES[rule], "", measured(one, "loss"), measured(one, "bits_per_byte"), "", "")
            for rule, one in told["macro"].items()
        ]
    costs = [
        f"{name}: causal selection costs {signed(one, 'loss')} nats per token"
        for name, one in told.get("difference", {}).items()
    ]
    listed = element("ul", "".join(element("li", html.escape(line)) for line in costs)) if costs else ""
    return table(rows) + listed


def _caches(told: dict[str, Any]) -> str:
    """What policies of a recursion's cache cost."""
    if not told.get("caches"):
        return ""
    rows = [("cache", "", "bytes per token", "nats per token", "more than with every pass")]
    for one in told["caches"]["points"]:
        rows.append((one["cache"], "exact" if one["exact"] else "inexact", f"{one['bytes_per_token']:,.0f}",
                     measured(one, "loss"), signed(one["difference"], "loss")))  # fmt: skip
    return table(rows)


def _curves(told: dict[str, Any]) -> str:
    figures = []
    if told.get("depths"):
        curve = told["depths"]
        points = [(float(point["passes"]), point["loss"]) for point in curve["points"]]
        note = f"{curve['says']}; trained with {curve['trained']}"
        figures.append(line_chart("Loss over depth", [Series("loss", points, 1, "dots")], x="passes",
                                  y="nats per token", note=note))  # fmt: skip
    contexts = []
    for i, (name, rules) in enumerate(told.get("sets", {}).items()):
        found = rules[told["rules"][-1]].get("by_context", ())
        contexts.append(
            Series(name, [(float(group["from"]), group["loss"]) for group in found], 1 + i % COLOURS, "dots")
        )
    figures.append(line_chart("Loss over tokens before it", contexts, x="tokens of context, from", y="nats per token"))
    return grid(*filter(None, figures))


def _tasks(told: dict[str, Any]) -> str:
    if not told.get("tasks"):
        return ""
    rows = [("task", "kind", "items", "shots", "right", "above chance")]
    for name, one in told["tasks"].items():
        rows.append((name, one["kind"].replace("_", " "), f"{one['items']:,}", str(one["shots"]),
                     measured(one, "accuracy"), measured(one, "centred")))  # fmt: skip
    mean = told["tasks_mean"]
    rows.append(("CORE" if mean["core"] else "mean of tasks", "", "", "", "", measured(mean, "centred")))
    return table(rows, last_is_sum=True)
