"""Where evaluations are kept: one JSON each, in the folder `evaluations` beside the checkpoints of a run."""

import datetime
import itertools
import json
import math
from pathlib import Path
from typing import Any

import adaptive
from adaptive.data.files import write_text_atomically
from adaptive.errors import CheckpointError, UserError
from adaptive.recipe import name_from

FOLDER = "evaluations"
FORMAT = 1


def file_for(run: Path, step: int, name: str, *, ema: bool = False) -> Path:
    """The file of an evaluation; without a name, step-STEP with the first number that is free.

    Raises UserError for a name that is taken, and one that can be no file's.
    """
    folder = run / FOLDER
    if not name:
        stem = f"step-{step}{'-ema' * ema}"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        return next(path for each in names if not (path := folder / f"{each}.json").exists())
    if name_from(name) != name:
        raise UserError(f"--name {name}: letters, digits, _, - and . alone, as in {name_from(name)}")
    path = folder / f"{name}.json"
    if path.exists():
        raise UserError(f"{path} is there already: choose another --name, or remove it")
    return path


def write(path: Path, told: dict[str, Any]) -> None:
    """Writes an evaluation. Raises CheckpointError where the disk refuses."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"format": FORMAT, "program": f"adaptive {adaptive.__version__}", "time": now}
    try:
        write_text_atomically(path, json.dumps(_finite({**about, **told}), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


def kept(run: Path, name: str = "") -> dict[str, Any]:
    """The evaluation of a run of this name, or its newest. Raises CheckpointError where there is none."""
    found = read_all(run)
    if not found:
        raise CheckpointError(f"{run} has no evaluation: adaptive evaluate --checkpoint {run} makes one")
    if name and name not in found:
        raise CheckpointError(f"{run} has no evaluation called {name}; there are {', '.join(found)}")
    return found[name or list(found)[-1]]


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_all(run: Path) -> dict[str, dict[str, Any]]:
    """The evaluations of a run by name, the oldest first; files that are none are passed over."""
    found = {}
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(told, dict) and isinstance(told.get("format"), int) and told["format"] <= FORMAT:
            found[path.stem] = told
    return dict(sorted(found.items(), key=lambda one: str(one[1].get("time"))))
