"""The alarm of data: steps wait for rows, and which source makes them slowly."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive.printable import printable
from adaptive.training.metrics import finite

MOST = 0.03  # share of a step that it may wait
STEPS = 100  # over so many
PREFIX = "data_ms/"  # of columns: milliseconds for the rows that a batch has of a source


class DataAlarm:
    """Reads the rows of a run; see `alarms.Alarm`.

    names  of the sources (`data.paths`)
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._said = ""
        self._begin()

    def _begin(self) -> None:
        self._steps, self._waited, self._took = 0, 0.0, 0.0

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        wait, step = finite(row, "data_wait_ms"), finite(row, "step_ms")
        if wait is None or step is None:
            return []
        steps = row["steps"]
        self._steps, self._waited, self._took = (
            self._steps + steps,
            self._waited + wait * steps,
            self._took + step * steps,
        )
        if self._steps < STEPS:
            return []
        before, self._said = self._said, self._message(row) if self._waited > MOST * self._took else ""
        self._begin()
        return [self._said] if self._said and not before else []

    def standing(self) -> list[str]:
        return [self._said] if self._said else []

    def _message(self, row: Mapping[str, Any]) -> str:
        wait, step = self._waited / self._steps, self._took / self._steps
        return (
            f"over {self._steps} steps each waited {wait:.1f} ms of {step:.1f} ms for data ({wait / step:.0%}); "
            f"{self._slowest(row)}. Raise data.workers, or prepare a token store with `adaptive data prepare`; where "
            "reading is slow now and then alone, raise data.prefetch"
        )

    def _slowest(self, row: Mapping[str, Any]) -> str:
        times = {name.removeprefix(PREFIX): row[name] for name in row if name.startswith(PREFIX)}
        if times:
            name = max(times, key=lambda name: times[name] or 0.0)
            return f"the slowest source is {printable(name)}, with {times[name]:.1f} ms for its rows of a batch"
        return f"it comes from {', '.join(map(printable, self._names))}"
