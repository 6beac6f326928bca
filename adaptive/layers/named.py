"""Parameters by their paths, such as embedding or body/inner/depth/router/out."""

import fnmatch
from collections.abc import Sequence


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is this path, or what it begins with. "*" and "?" stand for any text and any
    character."""
    return any(fnmatch.fnmatchcase(path, one) or fnmatch.fnmatchcase(path, f"{one.rstrip('/')}/*") for one in patterns)
