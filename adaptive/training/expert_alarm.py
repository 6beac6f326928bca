"""Says when routing fails: experts that starve, pairs that are dropped or lost, tokens that no expert takes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive.training.experts import BY_LAYER, PREFIX, layers_of

STARVED = 0.1  # of the fair share: an expert below it hardly learns
# Logging intervals in a row: routers sway while the learning rate warms up, and an expert that is back within a few
# intervals needs no attention. An evaluation stands alone: it is an average over all held-out text.
PATIENCE = 5
DROPPED = 0.1  # of the pairs that were wanted
# Tokens without an expert, above what choices independent of each other would leave out. Published expert-choice models
# leave out 1% to 3%, 8% with varied capacities, but 20% to 32% in their first layer (EC-DLM, arXiv 2604.01622).
LEFT_OUT, LEFT_OUT_FIRST = 0.1, 0.35
_NAMED = 3  # layers, settings, and twice as many experts of a layer, that a message names


class ExpertAlarm:
    """Reads the rows of a run in order; `alike` are the routed feed-forwards of one kind among the model's facts.

    A message comes again only when it holds for a further layer, or for half as many experts more. What held is
    forgotten once its quantity is away from the limit by a factor of two, so that neither a value near the limit nor a
    collapse that takes one expert after the other is news at every row.
    """

    def __init__(self, alike: Sequence[Any]):
        self._paths = {one.path for one in alike}
        self._settings = alike[0].settings
        self._at = [one.setting for one in alike]
        self._watches: dict[str, _Watch] = {}

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """What a row, of training or of an evaluation, gives new reason to say."""
        said = []
        for name in row:
            if name.endswith(f"{PREFIX}load"):
                for finding in self._findings(row, name.removesuffix(f"{PREFIX}load")):
                    if self._watches.setdefault(finding.name, _Watch()).sees(finding):
                        said.append(self._watches[finding.name].message)
        return said

    def standing(self) -> list[str]:
        """All that holds at the newest row of each kind."""
        return [watch.message for watch in self._watches.values() if watch.message]

    def _findings(self, row: Mapping[str, Any], place: str) -> "Iterator[_Finding]":
        """place: "" in rows of training, "eval/" or "eval/threshold/" in rows of evaluations."""
        mine = self._own(row, place)
        if not mine:
            return
        layers = [_name(*layers_of(row, place)[i]) for i in mine]
        column = lambda name: _floats(row.get(f"{place}{BY_LAYER}{name}"), mine)  # noqa: E731
        patience, lasting = (1, "") if place else (PATIENCE, f" in {PATIENCE} logging intervals in a row")
        where, router, at = _where(place), self._settings.router, self._at[0]
        likewise = f" (likewise {_several(self._at[1:], _NAMED)})" if self._at[1:] else ""

        load = _relative([row[f"{place}{PREFIX}load"][i] for i in mine])
        if router.even:
            relief = f"got below {STARVED:.0%} of the fair share of tokens{lasting}; {router.against_starving(at)}"
            tell = functools.partial(_starved, where, relief + likewise, layers)
            yield _Finding(f"{place}starved", load < STARVED, load < 2 * STARVED, patience, tell)
        buffers = "raise mesh.expert_parallel.buffer_factor (-1 loses nothing)"
        for name, what, relief in (
            ("dropped_fraction", "dropped", router.against_dropping(at) + likewise),
            ("lost_fraction", "lost between devices", buffers),
        ):
            share = column(name)
            tell = functools.partial(_gone, f"{where}pairs of a token and an expert were {what}", relief, layers, share)
            yield _Finding(f"{place}{name}", share > DROPPED, share > DROPPED / 2, 1, tell)
        if router.zeros() or not router.even:
            return  # tokens may choose to take no expert
        experts, left_out = load.shape[1], column("without_expert")
        excess = left_out - (1 - np.minimum(column("per_token") / experts, 1.0)) ** experts
        excess = np.where(column("dropped_fraction") > DROPPED / 2, 0.0, excess)  # which has been said
        limit = np.array([LEFT_OUT_FIRST if i == 0 else LEFT_OUT for i in mine])
        what = f"{where}tokens were taken by no expert{lasting}"
        relief = f"raise {at}.router.experts_per_token, or let {at}.shared_size give every token something{likewise}"
        tell = functools.partial(_gone, what, relief, layers, left_out)
        yield _Finding(f"{place}left out", excess > limit, excess > limit / 2, patience, tell)

    def _own(self, row: Mapping[str, Any], place: str) -> list[int]:
        """Which of a row's calls are of these feed-forwards; all where only one part is routed."""
        parts = row.get(f"{place}{BY_LAYER}part")
        if parts is None:
            return list(range(len(row[f"{place}{BY_LAYER}layer"])))
        return [i for i, part in enumerate(parts) if part in self._paths]


class _Finding(NamedTuple):
    """One thing to watch at a row: bool arrays of layers, or of layers and experts, that are beyond the limit or near
    it; after how many rows in a row it is told; and how, given those of whom it holds."""

    name: str
    beyond: np.ndarray
    near: np.ndarray
    patience: int
    tell: Callable[[np.ndarray], str]


class _Watch:
    def __init__(self) -> None:
        self.message = ""
        self._rows: np.ndarray | int = 0
        self._holds: np.ndarray | bool = False
        self._told: np.ndarray | bool = False  # what still holds of what was said

    def sees(self, finding: _Finding) -> bool:
        """Whether there is something new."""
        self._rows = np.where(finding.beyond, self._rows + 1, 0)
        self._holds = holds = (self._holds & finding.near) | (self._rows >= finding.patience)
        self._told = told = holds & self._told
        now = holds & finding.beyond
        self.message = finding.tell(now) if now.any() else ""
        layers = lambda a: a.reshape(len(a), -1).any(-1)  # noqa: E731
        new = bool((layers(holds) & ~layers(told)).any()) or holds.sum() > 1.5 * told.sum()
        if new:
            self._told = holds
        return new


def _where(place: str) -> str:
    selection = place.removeprefix("eval/").removesuffix("/")
    told = "on held-out text " if place else ""
    return f"{told}under {selection} selection " if selection else told


def _name(number: int, stack: str) -> str:
    return f"layer {number} of {stack}" if stack else f"layer {number}"


def _relative(load: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Load over the fair share, f64[calls, experts], NaN for calls without tokens."""
    experts = max((len(shares) for shares in load if shares), default=1)
    nothing = [np.nan] * experts
    return np.array([nothing if shares is None else shares for shares in load]) * experts


def _floats(values: Sequence[float | None] | None, calls: Sequence[int]) -> np.ndarray:
    """Those of these calls; NaN where a row lacks them."""
    own = [None if values is None else values[i] for i in calls]
    return np.array([np.nan if v is None else v for v in own], float)


def _starved(where: str, below: str, layers: Sequence[str], bad: np.ndarray) -> str:
    parts = []
    for layer, found in zip(layers, map(np.flatnonzero, bad), strict=True):
        names = _several([str(e) for e in found], 2 * _NAMED)
        if 0 < found.size <= 2 * _NAMED:
            parts.append(f"expert{'s' if found.size > 1 else ''} {names} of {layer}")
        elif found.size:
            parts.append(f"{found.size} of {bad.shape[1]} experts of {layer} ({names})")
    return f"{where}{_several(parts, _NAMED, '; ')} {below}"


def _gone(what: str, relief: str, layers: Sequence[str], share: np.ndarray, bad: np.ndarray) -> str:
    shares = [f"{share[i]:.0%} in {layers[int(i)]}" for i in np.flatnonzero(bad)]
    return f"{what}: {_several(shares, _NAMED)}; {relief}"


def _several(names: list[str], most: int, between: str = ", ") -> str:
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
