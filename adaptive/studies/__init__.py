"""Studies: a sweep of runs and what follows from them. A door: one file per study, found by its name.

A study's file has a `STUDY`, of a class below `Study`. What studies share (runs, fits, pictures, pages) is in
`adaptive.sweeps`.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from adaptive.errors import UserError
from adaptive.settings import nearest
from adaptive.sweeps.page import Page
from adaptive.sweeps.runs import Outcome, Planned, Scored, scored


@dataclasses.dataclass(frozen=True)
class Form:
    """What of a study is asked for.

    quick  few and small runs, minutes on a laptop
    seeds  of every run, from 0
    match  what runs of one size share: FLOPs of training, or tokens
    """

    quick: bool = False
    seeds: int = 1
    match: Literal["compute", "data"] = "compute"


class Study:
    """about: a line for --help; seeds: of every run, where nobody says how many."""

    about = ""
    seeds = 1

    def runs(self, form: Form, workdir: Path) -> list[Planned]:
        """All runs, the cheapest first; nothing is written."""
        raise NotImplementedError

    def prepare(self, workdir: Path) -> None:
        """Writes what runs need in the study's folder and is not there."""

    def score(self, trained: Any, folder: Path) -> Scored:
        """What a finished run gives on held-out text: of its model, as `adaptive.runs.load` has it, and its folder."""
        return scored(trained, folder)

    def page(self, form: Form, outcomes: Sequence[Outcome], missing: Sequence[str]) -> Page:
        """What follows from the runs that are finished; missing: names of the others."""
        raise NotImplementedError


def names() -> list[str]:
    """Of all studies, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Study:
    """The study of this name. Raises UserError for an unknown one, with those that there are."""
    if name not in names():
        near = nearest(name, names())
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no study '{name}'; {hint}there are: {', '.join(names())}")
    return importlib.import_module(f"adaptive.studies.{name}").STUDY
