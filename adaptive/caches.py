"""Where this machine keeps what can be made again: compiled programs, tokens of text, decompressed corpora."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from adaptive.errors import UserError
from adaptive.paths import local_path


def cache_folder() -> Path:
    """The folder of all caches: `adaptive` in $XDG_CACHE_HOME, or in ~/.cache.

    A user without a home folder, or with one that cannot be written, as in containers, gets a folder of their own among
    the temporary ones. Raises UserError where there is no place at all.
    """
    with contextlib.suppress(RuntimeError):  # there is no home
        named = os.environ.get("XDG_CACHE_HOME")
        folder = (local_path(named, "XDG_CACHE_HOME") if named else Path.home() / ".cache") / "adaptive"
        if can_be_written(folder):
            return folder
    return _temporary()


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in the folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """adaptive-UID in the temporary folder, which anybody may write to: it must be ours, and closed to others."""
    try:
        folder = Path(tempfile.gettempdir()) / f"adaptive-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise _nowhere(str(error)) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise _nowhere(f"{folder} is not a folder of this user alone")
    return folder


def _nowhere(why: str) -> UserError:
    return UserError(
        f"no folder for caches: the home folder cannot be written, and {why}. Set ADAPTIVE_CACHE and "
        "JAX_COMPILATION_CACHE_DIR to folders that can (for tokens alone: data.cache_dir)"
    )
