"""A folder for a run whose workdir was not given."""

from pathlib import Path

from adaptive.errors import CheckpointError


def claim(parent: Path, name: str) -> int:
    """Makes the first of parent/NAME-1, parent/NAME-2, ... that does not exist, and returns its number.

    Of commands that are started together each gets a number of its own. Raises CheckpointError where no folder can be
    made.
    """
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return number
        except FileExistsError:
            number += 1
        except OSError as error:
            raise CheckpointError(
                f"cannot make the folder {folder}: {error.strerror or error}; choose a --workdir"
            ) from None
