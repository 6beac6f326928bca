"""Expert routers, one file each: a class `Router` (or `Layer`, where its experts are of a kind of their own)
and the settings `Options`. A new file is a new router."""

import importlib
import pkgutil
from types import ModuleType

from adaptive.errors import RecipeError
from adaptive.overrides import nearest


def names() -> list[str]:
    """Names of all routers, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The file of the router `name`; RecipeError for an unknown one, with the nearest."""
    if name not in names():
        near = nearest(name, names()) or names()
        raise RecipeError(f"model.moe.router={name}: there is no such router; nearest: {', '.join(near)}")
    return importlib.import_module(f"{__name__}.{name}")
