"""The run that a checkpoint is of."""

from typing import Any

from adaptive.errors import CheckpointError
from adaptive.runs.folder import RECIPE_FILE
from adaptive.runs.load import Found, find
from adaptive.runs.mirror import CHECKPOINTS


def locate(path: Any, step: int | None = None) -> tuple[Any, Found]:
    """The folder of the run, and its newest checkpoint or that of `step`.

    path  of a run, of its checkpoints, or of one of them, which says the step; in a bucket an `etils.epath.Path`

    Raises CheckpointError as `find` does, and where the path and `step` say two steps.
    """
    if (path / RECIPE_FILE).exists() or path.is_file():
        return path, _found(path, step)
    if path.name == CHECKPOINTS and (path.parent / RECIPE_FILE).exists():
        return path.parent, _found(path.parent, step)
    if path.parent.name == CHECKPOINTS and path.name.isdecimal() and (path.parent.parent / RECIPE_FILE).exists():
        if step not in (None, int(path.name)):
            raise CheckpointError(f"--checkpoint {path} is of step {path.name}, and --step says {step}: give one")
        return path.parent.parent, _found(path.parent.parent, int(path.name))
    return path, _found(path, step)


def _found(run: Any, step: int | None) -> Found:
    return find(run, step, option="--checkpoint")
