"""Pieces of SVG and of HTML that all charts are made of, and where their ticks are."""

import html
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from adaptive.training.report.numbers import compact

Format = Callable[[float], str]
NARROW = 360  # pixels that a picture for a small screen is drawn for


def element(tag: str, content: str = "", /, **attributes: Any) -> str:
    """An element. Attribute names spell - as _ and `class` as `kind`; floats are rounded to a tenth of a pixel.
    `content` is markup and is not escaped."""
    named = {("class" if name == "kind" else name.replace("_", "-")): value for name, value in attributes.items()}
    spelled = (f' {name}="{html.escape(_spelled(value))}"' for name, value in named.items())
    return f"<{tag}{''.join(spelled)}>{content}</{tag}>"


def _spelled(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def label(text: str, x: float, y: float, kind: str, anchor: str = "start", middle: bool = False) -> str:
    """Text at a place; `middle` centres it on y."""
    shift = {"dy": "0.32em"} if middle else {}
    return element("text", html.escape(text), kind=kind, x=x, y=y, text_anchor=anchor, **shift)


def rule(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    """A straight line."""
    return element("line", kind=kind, x1=x1, x2=x2, y1=y1, y2=y2)


def picture(title: str, body: str, width: int, height: int) -> str:
    return element("svg", body, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def at_widths(draw: Callable[[int], str], width: int) -> str:
    """What `draw` draws for a page, so wide, and again for a small screen; the style sheet shows one of them."""
    return element("div", draw(width), kind="wide") + element("div", draw(NARROW), kind="narrow")


def with_data(svg: str, data: Any) -> str:
    """A picture followed by what the page's script is told of it, as JSON."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return svg + element("script", text, type="application/json")


def figure(title: str, pictures: str, *, legend: str = "", note: str = "") -> str:
    """Pictures with a caption."""
    caption = element("figcaption", element("b", html.escape(title)) + legend)
    below = element("p", html.escape(note), kind="note") if note else ""
    return element("figure", caption + below + pictures, kind="chart")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with their key, each (name, classes); nothing for a single one."""
    if len(entries) < 2:
        return ""
    items = (element("span", element("i", kind=f"key {kind}") + html.escape(name)) for name, kind in entries)
    return element("span", "".join(items), kind="legend")


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high, 1, 2, 2.5 or 5 times a power of ten apart, at most `about` + 1 of them."""
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.999 * raw)
    return [i * gap for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers for a logarithmic axis: powers of ten, with 2 and 5 (or all digits) between where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8), (1, 2, 3, 5), (1, 3), (1,)):
        found = [d * 10.0**e for e in decades for d in digits if low * 0.999 <= d * 10.0**e <= high * 1.001]
        if len(found) <= about + 2:
            return found
    return found[:: math.ceil(len(found) / about)]


def short(value: float, unit: str = "") -> str:
    """A tick: compact, without trailing zeros, and with the prefix of its unit alone."""
    digits, prefix = re.fullmatch(r"(.*?)([^\d.]*)", compact(value, unit).removesuffix(unit)).groups()  # type: ignore[union-attr]
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + prefix.strip()


def decimals_for(values: Sequence[float], percent: bool = False) -> Format:
    """A format with the decimals by which neighbouring ticks differ; compact where ticks are large or tiny."""
    if percent:
        plain = decimals_for([100 * v for v in values])
        return lambda v: f"{plain(100 * v)}%"
    largest = max(map(abs, values), default=0.0)
    gap = min((b - a for a, b in itertools.pairwise(values)), default=largest)
    if largest >= 10_000:
        return short
    if gap and gap < 1e-3:
        return lambda v: f"{v:.1e}".replace("e-0", "e-") if v else "0"
    decimals = next((d for d in range(4) if abs(round(gap, d) - gap) < 1e-9), 3)
    return lambda v: f"{v:.{decimals}f}"
