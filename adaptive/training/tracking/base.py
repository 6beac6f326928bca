"""What every dashboard is told, and how a row of metrics becomes scalars and distributions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adaptive.training.experts import BY_LAYER, PREFIX, layers_of, scalar_columns

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class About:
    """What a dashboard is told of a run before its first row.

    workdir  the run's folder; `run_id` is its own, the same at every start
    name     of the recipe; `config` is the resolved recipe as nested dicts
    facts    of this start: parameters, FLOPs, devices, the commit of the code, ...
    start    step from which this start goes on
    tags, notes  the user's own
    """

    workdir: Path
    name: str
    run_id: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: int = 0
    tags: tuple[str, ...] = ()
    notes: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}-{self.run_id}"


class Tracker(Protocol):
    """Where a run is shown. No method raises, waits for a network, or returns anything."""

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: its scalars, those of each layer by themselves, and its distributions."""

    def text(self, name: str, step: int, text: str) -> None:
        """A passage or a sample."""

    def report(self, path: Path, step: int) -> None:
        """The run's report, an HTML page that needs nothing else."""

    def checkpoint(self, path: Path, step: int) -> None:
        """A checkpoint that is there now; told where it lies, not copied."""

    def finish(self) -> None:
        """Ends the run's record; gives up after a limited time."""


class Several:
    """Any number of trackers as one; none where nothing is tracked, as on processes other than 0."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = tuple(trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        for one in self.trackers:
            one.log(row)

    def text(self, name: str, step: int, text: str) -> None:
        for one in self.trackers:
            one.text(name, step, text)

    def report(self, path: Path, step: int) -> None:
        for one in self.trackers:
            one.report(path, step)

    def checkpoint(self, path: Path, step: int) -> None:
        for one in self.trackers:
            one.checkpoint(path, step)

    def finish(self) -> None:
        for one in self.trackers:
            one.finish()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a row that are known, those of layers under names of their own."""
    return {name: value for name, value in scalar_columns(row).items() if isinstance(value, (int, float))}


def distributions(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """Shares by index, under a name per layer: of tokens by their number of experts, of pairs by the expert they go
    to. Layers without tokens have none."""
    out = {}
    for name, value in row.items():
        if not (isinstance(value, list) and value and any(isinstance(one, list) for one in value)):
            continue
        place, by_layer, short = name.partition(BY_LAYER)
        if not by_layer:
            place, _, short = name.partition(PREFIX)
        for (number, stack), shares in zip(layers_of(row, place), value, strict=True):
            if shares:
                out[f"{place}{PREFIX}{stack}{'/' * bool(stack)}layer_{number}/{short}"] = [float(x) for x in shares]
    return out
