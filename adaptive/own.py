"""What users bring along: Python files by their path, and objects of modules by name, as in mypackage.routers:Settings.

Whatever such code does wrong is told as a RecipeError with file and line.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from adaptive.errors import RecipeError, UserError

_SPELLED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def named(text: str, where: str) -> Any:
    """The object that `text`, MODULE:NAME, names; modules are looked for in the working folder as well.

    Raises RecipeError, which begins with `where`, for what is spelled otherwise, cannot be imported or is not there.
    """
    if not _SPELLED.fullmatch(text):
        raise RecipeError(f"{where}={text}: something of your own is written MODULE:NAME, as in my.routers:Settings")
    module, _, name = text.partition(":")
    _make_importable(Path.cwd())
    with told(f"{where}={text}: importing {module}"):
        found = importlib.import_module(module)
    if not hasattr(found, name):
        raise RecipeError(f"{where}={text}: {found.__file__} has no {name}")
    return getattr(found, name)


def module_of(path: Path) -> ModuleType:
    """The Python file as a module, read anew; it may import its neighbours. Raises RecipeError where that fails."""
    if not path.is_file():
        raise RecipeError(f"cannot read the recipe {path}: there is no such file")
    _make_importable(path.absolute().parent)
    # What it defines is then known under the name that others import it by. A name that means another module is not
    # taken from that.
    name = path.stem if _is_found_as(path.stem, path) else _name_of(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with told(f"the recipe {path}"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turns an error of a user's own code inside the block into a RecipeError: `what` failed, and where."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"{what} failed: there is no module {error.name}, neither installed nor in {Path.cwd()} (PYTHONPATH adds "
            "folders)"
        ) from None
    except SyntaxError as error:
        raise RecipeError(f"{what} failed: {error.filename}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        raise RecipeError(f"{what} failed: {last.filename}, line {last.lineno}: {kind}: {error}") from error


def _make_importable(folder: Path) -> None:
    """After everything else, so that no file of the user's hides a package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _name_of(path: Path) -> str:
    return "file" + re.sub(r"\W", "_", str(path.absolute()))


def _is_found_as(name: str, path: Path) -> bool:
    with contextlib.suppress(ImportError, ValueError):  # ValueError: a module without a specification has the name
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        return spec is not None and spec.origin is not None and Path(spec.origin).absolute() == path.absolute()
    return False
