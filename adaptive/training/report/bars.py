"""Histograms and bars as inline SVG."""

from collections.abc import Sequence

from adaptive.training.report.numbers import compact
from adaptive.training.report.svg import at_widths, element, figure, label, legend, picture, rule, ticks

WIDTH = 360
_MOST_BARS = 40  # of a histogram
_WIDE, _TALL, _ROW, _LEAST_ROW = 560, 240, 62, 24  # of bar charts: as line charts, rows of these heights


def mirrored_histogram(
    title: str, above: Sequence[int], below: Sequence[int], *, names: tuple[str, str], note: str = ""
) -> str:
    """Two histograms over [0, 1] back to back, as shares of both together; "" if both are empty.

    above, below  counts in bins of equal width
    names         of the two
    """
    total = sum(above) + sum(below)
    if not total:
        return ""
    height, left, right, top, bottom = 210, 44, 10, 10, 28
    up, down = max(above) / total, max(below) / total
    scale = (height - top - bottom) / (up + down)
    middle = top + up * scale
    out = []
    for value in ticks(-down, up, 5):
        at = middle - value * scale
        out.append(rule("grid", left, WIDTH - right, at, at))
        out.append(label(f"{abs(value):.0%}", left - 6, at, "tick", "end", middle=True))
    bar = (WIDTH - left - right) / len(above)
    for i, counts in enumerate(zip(above, below, strict=True)):
        span = f"score {i / len(above):.2f} to {(i + 1) / len(above):.2f}"
        for side, count in enumerate(counts):
            if count:
                size = max(0.7, count / total * scale)
                tip = f"{span}: {compact(count)} {names[side]} ({count / total:.1%})"
                out.append(
                    _bar(left + i * bar + 0.7, middle if side else middle - size, bar - 1.4, size, side + 1, tip)
                )
    out.append(rule("axis", left, WIDTH - right, middle, middle))
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(label(f"{value:g}", left + value * (WIDTH - left - right), height - 10, "tick", "middle"))
    keys = legend([(names[0], "k1 fill"), (names[1], "k2 fill")])
    return figure(title, picture(title, "".join(out), WIDTH, height), legend=keys, note=note)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]], note: str = "") -> str:
    """Horizontal bars, each (label, size, text at its end); "" without bars."""
    if not bars:
        return ""
    row = min(_ROW, max(_LEAST_ROW, _TALL // len(bars)))
    left, right = (max(84, 7 * max(map(len, texts)) + 14) for texts in list(zip(*bars, strict=True))[::2])
    largest = max(size for _, size, _ in bars) or 1.0

    def draw(width: int) -> str:
        out = []
        for i, (name, size, text) in enumerate(bars):
            middle, length = (i + 0.5) * row, size / largest * (width - left - right)
            out.append(label(name, left - 12, middle, "name", "end", middle=True))
            out.append(_bar(left, middle - 0.32 * row, max(1.0, length), 0.64 * row, 1, f"{name}: {text}"))
            out.append(label(text, left + length + 10, middle, "name", middle=True))
        return picture(title, "".join(out), width, row * len(bars) + 8)

    return figure(title, at_widths(draw, _WIDE), note=note)


def histogram(title: str, counts: Sequence[int], *, x: str, colour: int = 1, note: str = "") -> str:
    """Upright bars of the shares of 1, 2, 3, ...; "" if nothing was counted.

    counts  how many have each size, the last with that size or a larger one
    x       unit of the sizes
    """
    total = sum(counts)
    if not total:
        return ""
    last = max(i for i, n in enumerate(counts) if n) + 1
    group = -(-last // _MOST_BARS)
    grouped = [sum(counts[i : i + group]) / total for i in range(0, last, group)]
    names = [_span(i * group + 1, min(last, (i + 1) * group), len(counts)) for i in range(len(grouped))]
    left, right, top, bottom = 46, 12, 12, 36
    floor, scale = _TALL - bottom, (_TALL - top - bottom) / max(grouped)

    def draw(width: int) -> str:
        bar, out = (width - left - right) / len(grouped), []
        for value in ticks(0.0, max(grouped), 4):
            at = floor - value * scale
            out.append(rule("grid", left, width - right, at, at))
            out.append(label(f"{value:.0%}", left - 6, at, "tick", "end", middle=True))
        for i, share in enumerate(grouped):
            if share:
                size, tip = max(0.7, share * scale), f"{names[i]} {x}: {share:.1%}"
                out.append(_bar(left + i * bar + 0.08 * bar, floor - size, 0.84 * bar, size, colour, tip))
        out.append(rule("axis", left, width - right, floor, floor))
        every = max(1, round(len(grouped) * 45 / width))
        for i in range(every - 1 if every > 1 else 0, len(grouped), every):
            out.append(label(str(i * group + 1), left + (i + 0.5) * bar, floor + 17, "tick", "middle"))
        out.append(label(x, width - right, floor + 33, "label", "end"))
        return picture(title, "".join(out), width, _TALL)

    return figure(title, at_widths(draw, _WIDE), note=note)


def _span(first: int, final: int, most: int) -> str:
    if final == most:
        return f"{first} or more"
    return f"{first}" if first == final else f"{first} to {final}"


def _bar(x: float, y: float, width: float, height: float, colour: int, tip: str) -> str:
    return element("rect", kind=f"bar c{colour}", x=x, y=y, width=width, height=height, rx=1.5, data_tip=tip)
