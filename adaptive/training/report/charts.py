"""Line charts as inline SVG. Colours are classes c1, c2, ... of the style sheet; hover is the page's script."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from adaptive.training.report.numbers import compact
from adaptive.training.report.svg import Format, decimals_for, element, figure, label, legend, picture, rule, ticks

WIDTH, HEIGHT = 560, 270
COLOURS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 42
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
    y_format: Format | None = None,
    note: str = "",
) -> str:
    """A figure of lines over one x axis; "" if no series has two points (one, for dots).

    x, y      axis titles
    x_unit    of x values, which are written compactly ("12.3M")
    y_range   limits of the y axis where not None; lines are cut off there
    y_format  of the y ticks; None: as many decimals as they need
    note      a line below the title
    """
    shown = [s._replace(points=thinned(_finite(s.points))) for s in series]
    shown = [s for s in shown if len(s.points) >= (1 if s.style == "dots" else 2)]
    if not shown:
        return ""
    frame = _Frame(
        _limits([p[0] for s in shown for p in s.points], (None, None), pad=0.0),
        _limits([p[1] for s in shown for p in s.points], y_range, pad=0.05),
    )
    body = [_axes(frame, x, y, x_unit, y_format or decimals_for(frame.y_ticks))]
    body += [_drawn(s, frame) for s in sorted(shown, key=lambda s: _LAYERS[s.style])]
    body.append(rule("cross", 0, 0, _TOP, HEIGHT - _BOTTOM))
    told = [s for s in shown if s.style != "faint"]
    return figure(
        title,
        picture(title, "".join(body), WIDTH, HEIGHT),
        legend=legend([(s.name, f"k{s.colour} {s.style}") for s in told]),
        data={"x": x, "series": [_hover(s, frame, x_unit) for s in told]},
        note=note,
    )


class _Frame:
    """From data to places in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x, self.y = x, y
        self.x_ticks, self.y_ticks = ticks(*x, 6), ticks(*y, 5)

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        share = (min(self.y[1], max(self.y[0], value)) - self.y[0]) / (self.y[1] - self.y[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _axes(frame: _Frame, x: str, y: str, x_unit: str, y_format: Format) -> str:
    out, bottom, right = [], HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in frame.y_ticks:
        at = frame.at_y(value)
        out += [rule("grid", _LEFT, right, at, at), label(y_format(value), _LEFT - 8, at, "tick", "end", middle=True)]
    out.append(rule("axis", _LEFT, right, bottom, bottom))
    for value in frame.x_ticks:
        at = frame.at_x(value)
        out += [rule("axis", at, at, bottom, bottom + 4), label(compact(value), at, bottom + 17, "tick", "middle")]
    title = f"{x} ({x_unit})" if x_unit else x
    return "".join([*out, label(title, right, HEIGHT - 6, "label", "end"), label(y, _LEFT, HEIGHT - 6, "label")])


def _drawn(series: Series, frame: _Frame) -> str:
    places = [(frame.at_x(a), frame.at_y(b)) for a, b in series.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    colour = f"c{series.colour}"
    if series.style != "dots":
        return element("polyline", kind=f"{series.style} {colour}", points=path)
    dots = (element("circle", kind=f"dots {colour}", cx=a, cy=b, r=3.2) for a, b in places)
    return element("polyline", kind=f"thin {colour}", points=path) + "".join(dots)


def _hover(series: Series, frame: _Frame, x_unit: str) -> dict[str, Any]:
    """What the script needs: places and texts, so that it formats nothing."""
    rows = ([round(frame.at_x(a), 1), round(frame.at_y(b), 1), compact(a, x_unit), exact(b)] for a, b in series.points)
    return {"name": series.name, "colour": series.colour, "points": list(rows)}


def exact(value: float) -> str:
    """Four significant digits."""
    if value and not 1e-3 <= abs(value) < 1e4:
        return compact(value) if abs(value) >= 1 else f"{value:.2e}"
    return f"{value:.4g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


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
    """A centred mean over up to `window` points on either side, fewer at the ends so that both stay where they are."""
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(window, i, len(points) - 1 - i)
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
