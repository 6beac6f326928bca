"""What is worth a warning in a run and in its report: the one list of alarms, and what a single row tells."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from adaptive.training.chunk_alarm import ChunkAlarm
from adaptive.training.expert_alarm import ExpertAlarm
from adaptive.training.metrics import finite

LATE = 0.5  # share of a run after which routers are expected to have settled


class Alarm(Protocol):
    """Reads the rows of a run in order."""

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """What a row, of training or of an evaluation, gives new reason to say."""
        ...

    def standing(self) -> list[str]:
        """All that holds at the newest row of each kind."""
        ...


def alarms(facts: Any) -> list[Alarm]:
    """Those of a model with these facts (`adaptive.models.facts`): one for each kind of experts, one for its chunks."""
    kinds: dict[Any, list[Any]] = {}
    for one in facts.experts:
        kinds.setdefault(one.settings, []).append(one)
    found: list[Alarm] = [ExpertAlarm(alike) for alike in kinds.values()]
    return [*found, ChunkAlarm(facts.chunking)] if facts.chunking else found


def health_warnings(row: Mapping[str, Any], recursion: str, progress: float = 1.0) -> dict[str, str]:
    """What is worrying in a training or evaluation row, or in both as one: a sentence by the name of the measure.

    recursion  dotted path of the recursive body, from the model's facts
    progress   share of the run's steps taken at the row

    Limits: MoR paper, section on router design (its good runs have sampling accuracy above 99%, dead tokens below 0.4%,
    MaxVio 0.27); data wait above 3% of the step.
    """
    found: dict[str, str] = {}
    low = _both(row, "routing/accuracy", lambda value: value < 0.95, "{:.1%}")
    if progress >= LATE and low:
        found["sampling accuracy"] = (
            f"sampling accuracy {low} (good: above 99%): the causal decision often differs from top-k, "
            f"so generated text takes other depths than training did; raise {recursion}.depth.aux_coefficient"
        )
    if high := _both(row, "routing/max_vio", lambda value: value > 1, "{:.2f}"):
        found["MaxVio"] = (
            f"MaxVio {high} (good: below 0.5): one depth takes more than twice its share of tokens; "
            f"raise {recursion}.depth.balance_coefficient"
        )
    dead = finite(row, "eval/dead_token_ratio")
    if dead is not None and dead > 0.05 + (finite(row, "eval/dead_token_ratio_by_chance") or 0.0):
        found["dead positions"] = (
            f"{dead:.1%} of positions never reach the last recursion (good: below 0.4%): the router chooses by position"
        )
    wait, step = finite(row, "data_wait_ms"), finite(row, "step_ms")
    if wait is not None and step and wait > 0.03 * step:
        found["waiting"] = (
            f"the step waits {wait:.1f} ms of {step:.1f} ms for data ({wait / step:.0%}): raise data.prefetch, "
            "give streamed text data.workers, or prepare a token store with `python -m adaptive.data prepare`"
        )
    if finite(row, "skipped"):
        found["skipped"] = f"{row['skipped']} step(s) skipped: the loss or a gradient was not finite"
    return found


def _both(row: Mapping[str, Any], name: str, bad: Callable[[float], bool], form: str) -> str:
    """What is bad of a measure in training and on held-out text, in words; empty where neither is."""
    places = {"": "in training", "eval/": "on held-out text"}
    values = {place: finite(row, f"{prefix}{name}") for prefix, place in places.items()}
    return ", ".join(f"{form.format(v)} {place}" for place, v in values.items() if v is not None and bad(v))
