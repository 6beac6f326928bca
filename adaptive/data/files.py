"""Where the data room keeps files, and how it writes them so that a reader never sees half of one."""

import contextlib
import glob
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from adaptive.caches import cache_folder
from adaptive.errors import DataError
from adaptive.paths import local_path

ELSEWHERE = "Set data.cache_dir, or ADAPTIVE_CACHE, to a folder that can be written."


def cache_dir(configured: str = "") -> Path:
    """The folder of decompressed corpora and cached token stores: `configured`, $ADAPTIVE_CACHE or the user's own.

    Raises UserError for an address of another place, and where the user has no folder that can be written.
    """
    if configured:
        return local_path(configured, "data.cache_dir")
    if named := os.environ.get("ADAPTIVE_CACHE"):
        return local_path(named, "ADAPTIVE_CACHE")
    return cache_folder()


def digest(value: object) -> str:
    """sha256 (hex) of a JSON-able value; equal values give equal digests in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def beside(path: Path) -> Path:
    """A name next to `path` that no other process uses, for what will be renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def temporary_pattern(path: Path) -> str:
    """A glob of the names that `beside` gives."""
    return f".{glob.escape(path.name)}.*.tmp"


def sync(path: Path) -> None:
    """Waits until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`: afterwards the file is whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, as `write_atomically` does."""
    write_atomically(path, text.encode("utf-8"))


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turns an OSError inside the block (no permission, disk full) into a DataError: `what` failed, `remedy`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what} failed: {error.strerror or error} ({error.filename or 'no file'}). {remedy}"
        ) from error
