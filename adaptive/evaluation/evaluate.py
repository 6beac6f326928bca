"""Numbers of sets: by rule of selection side by side, and over depths."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptive.evaluation import bootstrap
from adaptive.evaluation.bootstrap import Resampled, interval, resampled
from adaptive.evaluation.cost import compute_per_token
from adaptive.evaluation.predictions import by_context, by_kind, calibration, predict, sums_by
from adaptive.evaluation.sets import EvaluationSet
from adaptive.evaluation.subject import Subject

Say = Callable[[str], None]
MEASURES = ("loss", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one pass over a set gave: as JSON, and the resamples behind its intervals."""

    told: dict[str, Any]
    resamples: Resampled | None


def measure(
    subject: Subject,
    data: EvaluationSet,
    rule: str,
    *,
    passes: int | None = None,
    most: int = 0,
    resamples: int = bootstrap.RESAMPLES,
) -> Measured:
    """One set by one rule; passes, most: see `predict`."""
    said, computed = predict(subject, data, rule, passes, most)
    documents = len(np.unique(said.document))
    unit, by = (said.document, "documents") if documents >= bootstrap.FEWEST else (said.row, "rows")
    sums = sums_by(unit, said, subject.tokenizer)
    drawn = resampled(sums, 0, resamples)
    size = float(sums.bytes.sum())
    told = {
        "targets": len(said.nll),
        "bytes": int(size),
        "documents": documents,
        "resampled": by,
        "loss": float(sums.loss()),
        "loss_interval": interval(None if drawn is None else drawn.loss),
        "bits_per_byte": float(sums.bits_per_byte()) if size > 0 else None,
        "bits_per_byte_interval": interval(None if drawn is None else drawn.bits_per_byte),
        "accuracy": float(said.right.mean()),
        "calibration": calibration(said),
        "by_kind": by_kind(said, subject.tokenizer),
        "by_context": by_context(said),
        "compute": compute_per_token(subject.recipe, rule, passes, computed),
    }
    return Measured(told, drawn)


def evaluate_sets(
    subject: Subject, sets: Sequence[EvaluationSet], *, most: int = 0, resamples: int = bootstrap.RESAMPLES,
    say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Every set by every rule, their macro average, and the difference between rules; JSON."""
    found: dict[str, dict[str, Measured]] = {}
    for data in sets:
        for rule in subject.rules:
            say(f"{data.name}, {rule}")
            found.setdefault(data.name, {})[rule] = measure(subject, data, rule, most=most, resamples=resamples)
    out: dict[str, Any] = {
        "sets": {name: {rule: one.told for rule, one in rules.items()} for name, rules in found.items()},
        "macro": {rule: macro([rules[rule] for rules in found.values()]) for rule in subject.rules},
    }
    if len(subject.rules) > 1:
        first, second = subject.rules
        out["difference"] = {name: difference(rules[first], rules[second]) for name, rules in found.items()}
    return out


def macro(measured: Sequence[Measured]) -> dict[str, Any]:
    """Unweighted means over sets; in a resample, of the means that it gives for each."""
    out: dict[str, Any] = {"sets": len(measured)}
    for name in MEASURES:
        values = [one.told[name] for one in measured]
        drawn = [one.resamples for one in measured]
        whole = all(value is not None for value in values)
        out[name] = float(np.mean(values)) if whole else None
        known = whole and all(one is not None for one in drawn)
        out[f"{name}_interval"] = interval(np.mean([getattr(one, name) for one in drawn], axis=0)) if known else None
    return out


def difference(first: Measured, second: Measured) -> dict[str, Any]:
    """How much more the second loses than the first, on the same documents."""
    out: dict[str, Any] = {}
    for name in MEASURES:
        a, b = first.told[name], second.told[name]
        out[name] = None if a is None or b is None else b - a
        both = first.resamples is not None and second.resamples is not None
        drawn = getattr(second.resamples, name) - getattr(first.resamples, name) if both else None
        out[f"{name}_interval"] = interval(drawn)
    return out
