"""A recipe file in JSON that states a difference alone: a base, and settings by dotted name, nested, or both.

{"base": "mor_tiny", "train.steps": 500, "model": {"width": 64, "body": {"depth": {"kind": "token_choice"}}}}
"""

from collections.abc import Iterator
from typing import Any

from adaptive.errors import RecipeError


def flat(tree: dict[str, Any], where: str, above: str = "") -> dict[str, Any]:
    """Dotted path -> value of every setting in the tree; what a part is comes as `path.kind`.

    Raises RecipeError, which begins with `where`, for a setting that is given twice.
    """
    found: dict[str, Any] = {}
    for path, value in _settings(tree, above):
        if path in found:
            raise RecipeError(f"{where}: {path} is given more than once; keep one")
        found[path] = value
    return found


def _settings(tree: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
