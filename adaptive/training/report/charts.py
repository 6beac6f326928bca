"""Line charts as inline SVG. Colours are classes c1, c2, ... of the style sheet; hover is the page's script."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from adaptive.training.report.numbers import compact
from adaptive.training.report.svg import (
    NARROW,
    Format,
    at_widths,
    decimals_for,
    element,
    figure,
    label,
    legend,
    log_ticks,
    picture,
    rule,
    short,
    ticks,
    with_data,
)

COLOURS = 6
_WIDTHS = {"half": 560, "full": 1140}
_HEIGHTS = {560: 270, 1140: 340, NARROW: 230}
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 36
_MOST_POINTS = 300  # per series: more cannot be told apart at this width
_LAYERS = {"faint": 0, "dashed": 1, "line": 2, "dots": 3}  # later ones are drawn over earlier ones

Point = tuple[float, float]
Range = tuple[float | None, float | None]


class Series(NamedTuple):
    """points in ascending x; colour 1 to COLOURS; faint lines are no part of the legend and of the hover."""

    name: str
    points: Sequence[Point]
    colour: int = 1
    style: Literal["line", "faint", "dots", "dashed"] = "line"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    x_unit: str = "",
    y_range: Range = (None, None),
    percent: bool = False,
    log: bool = False,
    size: Literal["half", "full"] = "half",
    note: str = "",
) -> str:
    """A figure of lines over one x axis; "" if no series has two points (one, for dots).

    x, y      axis titles
    x_unit    of x values, which are written compactly ("12.3M") and are not negative
    y_range   limits of the y axis where not None; lines are cut off there
    percent   y values are shares, written in percent
    log       both axes logarithmic; points at or below 0 are left out
    size      of half or of the full page's width
    note      a line below the title
    """
    shown = [s._replace(points=thinned(_drawable(s.points, log))) for s in series]
    shown = [s for s in shown if len(s.points) >= (1 if s.style == "dots" else 2)]
    if not shown:
        return ""
    told = [s for s in shown if s.style != "faint"]
    ends = (
        _limits([p[0] for s in shown for p in s.points], (None if log else 0.0, None), pad=0.0),
        _limits([p[1] for s in shown for p in s.points], y_range, pad=0.0 if log else 0.05),
    )

    def draw(width: int) -> str:
        frame = _Frame(*ends, log, width, _HEIGHTS[width])
        body = [_axes(frame, x, y, x_unit, decimals_for(frame.y_ticks, percent))]
        body += [_drawn(s, frame) for s in sorted(shown, key=lambda s: _LAYERS[s.style])]
        body.append(rule("cross", 0, 0, _TOP, frame.bottom))
        hover = {"x": x, "series": [_hover(s, frame, x_unit, percent) for s in told]}
        return with_data(picture(title, "".join(body), width, frame.height), hover)

    keys = legend([(s.name, f"k{s.colour} {s.style}") for s in told])
    return figure(title, at_widths(draw, _WIDTHS[size]), legend=keys, note=note)


class _Frame:
    """From data to places in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], log: bool, width: int, height: int):
        self._scale = math.log if log else float
        self._ends = {"x": x, "y": y}
        find = log_ticks if log else ticks
        self.x_ticks, self.y_ticks = find(*x, width // 90), find(*y, 5)
        self.width, self.height = width, height
        self.right, self.bottom = width - _RIGHT, height - _BOTTOM

    def at_x(self, value: float) -> float:
        return _LEFT + self._share("x", value) * (self.right - _LEFT)

    def at_y(self, value: float) -> float:
        return self.bottom - self._share("y", value) * (self.bottom - _TOP)

    def _share(self, axis: str, value: float) -> float:
        low, high = self._ends[axis]
        low_at, at, high_at = (self._scale(v) for v in (low, min(high, max(low, value)), high))
        return (at - low_at) / (high_at - low_at)


def _axes(frame: _Frame, x: str, y: str, x_unit: str, y_format: Format) -> str:
    out, bottom, right = [label(y, 0, 12, "label")], frame.bottom, frame.right
    for value in frame.y_ticks:
        at = frame.at_y(value)
        out += [rule("grid", _LEFT, right, at, at), label(y_format(value), _LEFT - 8, at, "tick", "end", middle=True)]
    out.append(rule("axis", _LEFT, right, bottom, bottom))
    for value in frame.x_ticks:
        at = frame.at_x(value)
        out += [
            rule("axis", at, at, bottom, bottom + 4),
            label(short(value, x_unit), at, bottom + 17, "tick", "middle"),
        ]
    return "".join([*out, label(f"{x} ({x_unit})" if x_unit else x, right, bottom + 33, "label", "end")])


def _drawn(series: Series, frame: _Frame) -> str:
    places = [(frame.at_x(a), frame.at_y(b)) for a, b in series.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    colour = f"c{series.colour}"
    if series.style != "dots":
        return element("polyline", kind=f"{series.style} {colour}", points=path)
    dots = (element("circle", kind=f"dots {colour}", cx=a, cy=b, r=3.2) for a, b in places)
    return element("polyline", kind=f"thin {colour}", points=path) + "".join(dots)


def _hover(series: Series, frame: _Frame, x_unit: str, percent: bool) -> dict[str, Any]:
    """What the script needs: places along x and texts, so that it formats nothing."""
    text = (lambda value: f"{value:.2%}") if percent else exact
    rows = ([round(frame.at_x(a), 1), compact(a, x_unit), text(b)] for a, b in series.points)
    return {"name": series.name, "colour": series.colour, "points": list(rows)}


def exact(value: float) -> str:
    """Four significant digits."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return compact(value) if abs(value) >= 1 else f"{value:.2e}"
    return f"{value:.4g}"


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    finite = ((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    return [(x, y) for x, y in finite if not log or (x > 0 and y > 0)]


def thinned(points: list[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points: of each stretch the one furthest from the stretch's mean, so that spikes survive."""
    if len(points) <= most:
        return points
    inner, kept = points[1:-1], []
    size = len(inner) / (most - 2)
    for i in range(most - 2):
        stretch = inner[round(i * size) : round((i + 1) * size)]
        mean = sum(y for _, y in stretch) / len(stretch)
        kept.append(max(stretch, key=lambda p: abs(p[1] - mean)))
    return [points[0], *kept, points[-1]]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """A centred mean over up to `window` points on either side, fewer near the ends so that both stay where they are
    and the steep beginning of a curve is followed."""
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(window, i // 4, len(points) - 1 - i)
        near = [y for _, y in points[i - reach : i + reach + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def _limits(values: Sequence[float], wanted: Range, pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * pad
    if high == low:
        room = abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    low, high = (low if wanted[0] is None else wanted[0]), (high if wanted[1] is None else wanted[1])
    return (low, high) if high > low else (low, low + 1.0)
