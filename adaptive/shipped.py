"""Folders of the repository that a wheel carries inside the package: recipes/ and launch/."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The folder `name` of the repository: beside the package in a checkout, `_NAME` inside an installed one.

    It is found by its place: a folder of the same name in a user's project has nothing to do with it.
    """
    inside = _PACKAGE / f"_{name}"
    return inside if inside.is_dir() else _PACKAGE.parent / name
