"""A heat map of loads as an HTML table: numbers are its text, so that it needs neither colour nor a script."""

import bisect
import html
from collections.abc import Sequence

from adaptive.training.report.svg import element

# Load over the fair share where one shade ends and the next begins.
_BOUNDS = (0.1, 0.5, 0.8, 1.25, 2.0, 4.0)
_NAMES = ("below 0.1", "to 0.5", "to 0.8", "to 1.25", "to 2", "to 4", "above 4")
_MOST_NUMBERED = 16  # experts whose cells have room for a number
_MOST_TIPS = 8192  # cells that say who they are when pointed at


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float] | None]], note: str = "") -> str:
    """Rows of load over the fair share, each (label, one number per column or None); "" without rows."""
    columns = max((len(values) for _, values in rows if values), default=0)
    if not columns:
        return ""
    dense, tips = columns > _MOST_NUMBERED, len(rows) * columns <= _MOST_TIPS
    every = 1 if not dense else 8
    heads = "".join(element("th", str(e) if e % every == 0 else "", scope="col") for e in range(columns))
    head = element("tr", element("th", "expert", scope="col", kind="corner") + heads)
    body = "".join(_row(label, values, columns, tips) for label, values in rows)
    table = element("table", element("thead", head) + element("tbody", body), kind=f"heat{' dense' * dense}")
    keys = "".join(element("span", element("i", kind=f"h{i}") + name) for i, name in enumerate(_NAMES))
    caption = element("figcaption", element("b", html.escape(title)) + element("span", keys, kind="legend scale"))
    below = element("p", html.escape(note), kind="note") if note else ""
    return element("figure", caption + below + element("div", table, kind="scroll"), kind="chart")


def _row(label: str, values: Sequence[float] | None, columns: int, tips: bool) -> str:
    name = element("th", html.escape(label), scope="row")
    if not values:
        return element("tr", name + element("td", "no tokens", colspan=columns, kind="none"))
    cells = []
    for e, value in enumerate(values):
        tip = {"title": f"{label}, expert {e}: {value:.2f} of its fair share"} if tips else {}
        cells.append(element("td", _number(value), kind=f"h{bisect.bisect_right(_BOUNDS, value)}", **tip))
    return element("tr", name + "".join(cells))


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
