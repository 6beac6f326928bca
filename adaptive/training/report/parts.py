"""What parts of the model told of themselves beyond what other sections know, as HTML; "" where none did."""

from typing import Literal

from adaptive.training.parts import KEYS, PREFIX
from adaptive.training.report.charts import COLOURS, Series, exact, line_chart
from adaptive.training.report.layout import grid, section, smooth, table
from adaptive.training.report.runs import Run


def parts(run: Run) -> str:
    """A chart for each thing that is told, with a colour for each part, and the newest values as a table."""
    told = _columns(run, PREFIX)
    names = dict.fromkeys(_divided(column)[1] for column in told)
    charts = [_chart(run, name, [column for column in told if _divided(column)[1] == name]) for name in names]
    shown = grid(_keys(run, "half"), *charts) if any(charts) else grid(_keys(run, "full"), columns="one")
    return section("What the parts tell", shown, _newest(run, told))


def _columns(run: Run, prefix: str) -> list[str]:
    """Columns that begin so, in training or, there behind "eval/", in evaluations."""
    names = {name.removeprefix("eval/") for row in (*run.training, *run.evaluations) for name in row}
    return sorted(name for name in names if name.startswith(prefix))


def _divided(column: str) -> tuple[str, str]:
    """(path of the part, name) of a column told/PATH/NAME."""
    path, _, name = column.removeprefix(PREFIX).rpartition("/")
    return path, name


def _keys(run: Run, size: Literal["half", "full"]) -> str:
    series = [
        Series(column.removeprefix(KEYS), run.points(f"eval/{column}", "tokens"), 1 + i % COLOURS, "dots")
        for i, column in enumerate(_columns(run, KEYS))
    ]
    note = "positions that a query of held-out text reads, on average"
    return line_chart("Keys per query", series, x="tokens", y="keys", y_range=(0, None), size=size, note=note)


def _chart(run: Run, name: str, columns: list[str]) -> str:
    series = []
    for i, column in enumerate(columns):
        path, colour = _divided(column)[0], 1 + i % COLOURS
        series.append(Series(path, smooth(run.points(column, "tokens")), colour))
        series.append(Series(f"{path}, held-out", run.points(f"eval/{column}", "tokens"), colour, "dots"))
    return line_chart(name.replace("_", " ").capitalize(), series, x="tokens", y="mean per call")


def _newest(run: Run, told: list[str]) -> str:
    if not told:
        return ""
    rows: list[tuple[str, ...]] = [("part", "what it tells, per call", "training", "held-out")]
    for column in told:
        values = (run.last.get(column), run.last_evaluation.get(f"eval/{column}"))
        rows.append((*_divided(column), *("—" if value is None else exact(value) for value in values)))
    return table(rows, kind="compare")
