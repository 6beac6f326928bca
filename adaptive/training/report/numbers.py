"""Numbers as people read them."""

import math

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def compact(value: float | None, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 12_345 -> "12.3k", 4.2e9 with unit "FLOP/s" -> "4.20 GFLOP/s".

    Without a unit, 1e9 is "B", as tokens and parameters are counted. None and NaN are "—".
    """
    if value is None or not math.isfinite(value):
        return "—"
    for size, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * size:
            scaled, prefix = value / size, prefix if unit else prefix.replace("G", "B")
            break
    else:
        scaled, prefix = value, ""
    digits = digits_of(scaled) if prefix or scaled != int(scaled) else f"{scaled:g}"
    return f"{digits} {prefix}{unit}" if unit else f"{digits}{prefix}"


def digits_of(value: float, significant: int = 3) -> str:
    """Fixed notation with so many significant digits, never fewer than those before the point."""
    if not math.isfinite(value):
        return "—"
    magnitude = int(f"{value:.{significant - 1}e}".partition("e")[2])  # of the rounded value: 9.999 has that of 10
    return f"{value:.{max(0, significant - 1 - magnitude)}f}"


def percent(value: float | None) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """ "42 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def clock(seconds: float | None) -> str:
    """ "1:05" or "2:03:09": a time left, short."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    s = max(0, round(seconds))
    hours = f"{s // 3600}:{s % 3600 // 60:02d}" if s >= 3600 else f"{s // 60}"
    return f"{hours}:{s % 60:02d}"
