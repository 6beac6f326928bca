"""Pictures of studies: SVG files that stand alone, in light and dark."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adaptive.training.report.svg import decimals_for, element, label, log_ticks, rule, short, ticks

WIDTH, _RIGHT, _LINE = 900, 150, 17
MARKS = ("circle", "square", "diamond", "triangle")
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.sheet { fill: #ffffff } .tick, .label { font-size: 12px; fill: #59636e } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #e6e9ec } .axis { stroke: #818b98 } .refer { stroke: #59636e; stroke-dasharray: 4 3 }
.lead { stroke: #b0b8c1 } .curve { fill: none; stroke: var(--c); stroke-width: 1.5; opacity: 0.8 }
.mark { fill: var(--c); stroke: #ffffff; stroke-width: 1 } .bar { stroke: var(--c); stroke-width: 2 }
.c0 { --c: #3d444d } .c1 { --c: #2463a6 } .c2 { --c: #23875d } .c3 { --c: #c8701c } .c4 { --c: #8c4b93 }
.c5 { --c: #b3362c }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .sheet { fill: #0d1117 } .tick, .label { fill: #9198a1 } .grid { stroke: #262b32 }
  .refer { stroke: #9198a1 } .lead { stroke: #3d444d } .mark { stroke: #0d1117 }
  .c0 { --c: #d1d7e0 } .c1 { --c: #6fa8e6 } .c2 { --c: #5cc096 } .c3 { --c: #e79a4e } .c4 { --c: #c58bcb }
  .c5 { --c: #ea7b70 }
}
"""

Point = tuple[float, float]
Scale = Callable[[float], float]


class Curve(NamedTuple):
    """points: as marks; line: through them, in ascending x; colour 0 to 5, mark 0 to 3."""

    name: str
    points: Sequence[Point]
    line: Sequence[Point]
    colour: int
    mark: int


class Whisker(NamedTuple):
    """A value with its interval; opacity tells those of one row apart."""

    value: float
    low: float
    high: float
    opacity: float = 1.0


class Row(NamedTuple):
    name: str
    whiskers: Sequence[Whisker]
    colour: int
    mark: int


def curves(title: str, all_of: Sequence[Curve], *, x: str, y: str, x_unit: str = "", height: int = 470) -> str:
    """Marks and lines over two logarithmic axes, each named at its right end."""
    xs = [p[0] for one in all_of for p in (*one.points, *one.line)]
    ys = [p[1] for one in all_of for p in (*one.points, *one.line)]
    longest = max(len(one.name) for one in all_of)
    left, right, top, bottom = 56, WIDTH - max(_RIGHT, 46 + 8 * longest), 58, height - 44
    at_x = _scale(math.log(min(xs)), math.log(max(xs) * 1.001), left + 8, right)
    low, high = math.log(min(ys)), math.log(max(ys))
    room = 0.04 * (high - low) or 0.1
    at_y = _scale(low - room, high + room, bottom, top)
    body = [label(y, left - 48, top - 12, "label")]
    y_ticks = ticks(min(ys), max(ys) * 1.0001, 6)
    for value in y_ticks:
        at = at_y(math.log(value))
        text = decimals_for(y_ticks)(value)
        body += [rule("grid", left, right, at, at), label(text, left - 8, at, "tick", "end", middle=True)]
    for value in log_ticks(min(xs), max(xs), 6):
        at = at_x(math.log(value))
        text = label(short(value, x_unit), at, bottom + 18, "tick", "middle")
        body += [rule("axis", at, at, bottom, bottom + 4), text]
    body += [rule("axis", left, right, bottom, bottom), label(f"{x} ({x_unit})", right, bottom + 38, "label", "end")]
    for one in all_of:
        places = " ".join(f"{at_x(math.log(a)):.1f},{at_y(math.log(b)):.1f}" for a, b in one.line)
        body.append(element("polyline", kind=f"curve c{one.colour}", points=places))
    for one in all_of:
        body += [_mark(one.mark, one.colour, at_x(math.log(a)), at_y(math.log(b))) for a, b in one.points]
    ends = [at_y(math.log((one.line or one.points)[-1][1])) for one in all_of]
    for one, end, place in zip(all_of, ends, _apart(ends, top, bottom), strict=True):
        body += [rule("lead", right + 4, right + 20, end, place), _mark(one.mark, one.colour, right + 28, place),
                 label(one.name, right + 38, place, "name", middle=True)]  # fmt: skip
    return _sheet(title, "".join(body), height)


def whiskers(
    title: str, rows: Sequence[Row], *, x: str, references: Sequence[tuple[float, str]], shades: Sequence[str] = ()
) -> str:
    """Values with intervals, a row for each name, beside vertical lines that mean something.

    shades  what opacities mean, the faintest first
    """
    spots = [v for row in rows for one in row.whiskers for v in (one.low, one.high, one.value)]
    low, high = min(*spots, *(v for v, _ in references)), max(*spots, *(v for v, _ in references))
    room = 0.04 * (high - low) or 0.1
    each = [max(26, 9 * len(row.whiskers) + 12) for row in rows]
    left, right, top = 120, WIDTH - 24, 74
    bottom = top + sum(each)
    at = _scale(low - room, high + room, left, right)
    x_ticks = ticks(low - room, high + room, 8)
    text = decimals_for(x_ticks)
    body = []
    for value in x_ticks:
        body += [rule("grid", at(value), at(value), top, bottom),
                 label(text(value), at(value), bottom + 18, "tick", "middle")]  # fmt: skip
    for value, name in references:
        body += [
            rule("refer", at(value), at(value), top - 6, bottom),
            label(name, at(value), top - 12, "label", "middle"),
        ]
    y = float(top)
    for row, size in zip(rows, each, strict=True):
        body.append(label(row.name, left - 12, y + size / 2, "name", "end", middle=True))
        for i, one in enumerate(row.whiskers):
            place = y + size / 2 + 9 * (i - (len(row.whiskers) - 1) / 2)
            drawn = rule(f"bar c{row.colour}", at(one.low), at(one.high), place, place)
            drawn += _mark(row.mark, row.colour, at(one.value), place)
            body.append(element("g", drawn, opacity=f"{one.opacity:.2f}"))
        y += size
    body += [rule("axis", left, right, bottom, bottom), label(x, right, bottom + 38, "label", "end")]
    if shades:
        body.append(label(f"from faint to dark: {', '.join(shades)}", left, bottom + 38, "label"))
    return _sheet(title, "".join(body), bottom + 50)


def _sheet(title: str, body: str, height: int) -> str:
    whole = (
        element("title", title) + element("style", _STYLE) + element("rect", kind="sheet", width=WIDTH, height=height)
    )
    whole += label(title, 16, 26, "title") + body
    size = {"viewBox": f"0 0 {WIDTH} {height}", "width": WIDTH, "height": height}
    return element("svg", whole, xmlns="http://www.w3.org/2000/svg", role="img", **size) + "\n"


def _scale(low: float, high: float, first: float, last: float) -> Scale:
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _mark(mark: int, colour: int, x: float, y: float) -> str:
    kind = f"mark c{colour}"
    match MARKS[mark]:
        case "circle":
            return element("circle", kind=kind, cx=x, cy=y, r=4.5)
        case "square":
            return element("rect", kind=kind, x=x - 4.0, y=y - 4.0, width=8, height=8)
        case "diamond":
            places = [(x, y - 5.5), (x + 5.5, y), (x, y + 5.5), (x - 5.5, y)]
        case _:
            places = [(x, y - 5), (x + 5, y + 4.5), (x - 5, y + 4.5)]
    return element("polygon", kind=kind, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places))


def _apart(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """The places, moved so that labels there do not overlap, in the same order and within the picture."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = list(places)
    least = top
    for i in order:
        out[i] = max(out[i], least)
        least = out[i] + _LINE
    most = bottom
    for i in reversed(order):
        out[i] = min(out[i], most)
        most = out[i] - _LINE
    return out
