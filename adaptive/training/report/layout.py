"""How parts of the page are put together."""

import html
from collections.abc import Sequence

from adaptive.training.report.charts import Point, smoothed
from adaptive.training.report.svg import element


def section(title: str, *parts: str, lead: str = "") -> str:
    """A headed section of those parts that are not empty."""
    body = "".join(parts)
    if not body:
        return ""
    return element("section", element("h2", title) + (element("p", lead, kind="lead") if lead else "") + body)


def grid(*figures: str, columns: str = "two") -> str:
    """Figures side by side where there is room."""
    body = "".join(figures)
    return element("div", body, kind=f"grid {columns}") if body else ""


def table(rows: Sequence[Sequence[str]], kind: str = "", last_is_sum: bool = False) -> str:
    """A table; the first row is its head. Cells are plain text."""
    line = lambda tag, cells: element("tr", "".join(element(tag, html.escape(c)) for c in cells))  # noqa: E731
    body = [line("td", cells) for cells in rows[1:]]
    if last_is_sum and body:
        body[-1] = body[-1].replace("<tr>", '<tr class="sum">')
    parts = element("thead", line("th", rows[0])) + element("tbody", "".join(body))
    return element("div", element("table", parts, kind=kind), kind="scroll")


def smooth(points: list[Point]) -> list[Point]:
    """A line for the eye through logged rows."""
    return smoothed(points, max(1, len(points) // 40))
