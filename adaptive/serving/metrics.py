"""What a server did, in the text that Prometheus reads."""

import bisect
import os
import time
from collections.abc import Mapping
from pathlib import Path

KIND = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
GAUGES = ("waiting", "running", "rows", "tokens_per_second", "cache_bytes", "cache_bytes_per_token")  # of an engine
_PAGES = Path("/proc/self/statm")


class Histogram:
    """How many seconds things took: counts up to each bound, and their sum."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*(f"{each:g}" for each in SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {_number(self._sum)}", f"{name}_count {total}"]


class Metrics:
    """Counted by the event loop alone.

    first, between, whole  seconds to a choice's first token, from one to the next, and of an answer
    failures               of the engine
    """

    def __init__(self) -> None:
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()
        self.failures = 0
        self._counts: dict[str, dict[str, float]] = {}
        self._begin = time.time()

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """name: without adaptive_ before and _total behind it; labels need no escape."""
        label = ",".join(f'{key}="{value}"' for key, value in labels.items())
        counts = self._counts.setdefault(name, {})
        counts[label] = counts.get(label, 0) + by

    def text(self, engine: Mapping[str, float]) -> str:
        """engine: its figures."""
        lines = []
        for name, counts in sorted(self._counts.items()):
            full = f"adaptive_{name}_total"
            lines += [f"# TYPE {full} counter"]
            lines += [
                f"{full}{{{label}}} {_number(n)}" if label else f"{full} {_number(n)}" for label, n in counts.items()
            ]
        for name, histogram in (("first_token", self.first), ("between_tokens", self.between), ("answer", self.whole)):
            full = f"adaptive_{name}_seconds"
            lines += [f"# TYPE {full} histogram", *histogram.lines(full)]
        for name, value in sorted(engine.items()):
            full, kind = (name, "gauge") if name in GAUGES else (f"{name}_total", "counter")
            lines += [f"# TYPE adaptive_engine_{full} {kind}", f"adaptive_engine_{full} {_number(value)}"]
        for name, value in self._process().items():
            lines += [f"# TYPE {name} gauge", f"{name} {_number(value)}"]
        return "\n".join(lines) + "\n"

    def _process(self) -> dict[str, float]:
        found: dict[str, float] = {"process_start_time_seconds": self._begin}
        if _PAGES.exists():
            found["process_resident_memory_bytes"] = int(_PAGES.read_text(encoding="ascii").split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
        return found


def _number(value: float) -> str:
    """To the last digit."""
    return str(int(value)) if value == int(value) else repr(float(value))
