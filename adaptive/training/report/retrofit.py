"""What replacing the routers of a trained model did, as HTML; "" where a run did not begin so."""

import json
from typing import Any

from adaptive.training.report.charts import Series, line_chart
from adaptive.training.report.layout import section, table
from adaptive.training.report.runs import Run

RETROFIT_FILE = "retrofit.json"
_COLUMNS = {
    "eval/loss": "nats per token",
    "eval/bits_per_byte": "bits per byte",
    "eval/experts/per_token": "experts per token",
    "eval/experts/without_expert": "tokens without any",
}
_MOST_ROWS = 12


def retrofit(run: Run) -> str:
    """Held-out loss before the change, right after it, and along the continuation."""
    try:
        told = json.loads((run.path / RETROFIT_FILE).read_text(encoding="utf-8"))
        before, after, source = dict(told["before"]), dict(told["after"]), f"{told['run']} at step {told['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    later = [row for row in run.evaluations if row["step"] > 0]
    shown = later if len(later) <= _MOST_ROWS else [*later[:: -(-len(later) // _MOST_ROWS)], later[-1]]
    rows = [("before, with token choice", before), ("right after, with expert choice", after)]
    rows += [(f"after {row['step']:,} more steps", row) for row in shown]
    names = [name for name in _COLUMNS if any(row.get(name) is not None for _, row in rows)]
    cells = [[title, *(_number(row.get(name)) for name in names)] for title, row in rows]
    points = [(float(row["step"]), float(row["eval/loss"])) for row in later if row.get("eval/loss") is not None]
    ends = (0.0, max([step for step, _ in points], default=0.0))
    series = []
    if after.get("eval/loss") is not None:
        series.append(Series("expert choice", [(0.0, after["eval/loss"]), *points], 2, "dots"))
    if before.get("eval/loss") is not None:
        series.append(Series("token choice, before", [(x, before["eval/loss"]) for x in ends], 1, "dashed"))
    chart = line_chart("Held-out loss along the continuation", series, x="steps", y="nats per token")
    lead = f"Parameters of {source}, of which no router changed but in the rule by which it chooses."
    return section(
        "From token choice to expert choice",
        table([["", *(_COLUMNS[name] for name in names)], *cells]),
        chart,
        lead=lead,
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
