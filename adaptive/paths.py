"""What a user names: a place on this machine, or an address of another.

Imports nothing but the standard library; a bucket's own package, when one is named.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from adaptive.errors import UserError

# One letter alone is a drive of Windows; `./a://b` is a path whatever its name.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # the package that reads it, and the extra with that
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux and of macOS
_SHOWN = 60  # characters of a text in a message


def is_address(text: str) -> bool:
    """Whether `text` is an address such as gs://bucket/folder, file:///folder included."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and (found[2] == "//" or found[1].lower() == "file")


def local_path(text: str, option: str) -> Path:
    """The path on this machine that `text` means: `~` is the home folder, file:///a/b is /a/b; globs stay as they are.

    option  how the user gave it, as in `--workdir` or `data.paths`; messages begin with it

    Raises UserError for an address of another place (gs:// and s3://, see `bucket_path`; hf://, https://), for `~`
    where no home folder is known, for no text at all, and for what no path can hold.
    """
    if why := _unusable(text):
        raise UserError(f"{option}: {text[:_SHOWN]!r} is no path: {why}")
    if is_address(text):
        return _of_address(text, option)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{option}: {text}: the home folder that ~ stands for is not known; write it out") from None


def bucket_scheme(text: str) -> str:
    """gs or s3, for an address in a bucket; empty for everything else."""
    found = _ADDRESS.fullmatch(text)
    return found[1].lower() if found and found[2] == "//" and found[1].lower() in BUCKETS else ""


def bucket_path(text: str, option: str) -> Any:
    """The place in a bucket that an address means, as an `etils.epath.Path`, which is used as a `pathlib.Path` is.

    Raises UserError for an address without a bucket or of another kind, and where the package for it is not installed.
    """
    if why := _unusable(text):
        raise UserError(f"{option}: {text[:_SHOWN]!r} is no address: {why}")
    scheme = bucket_scheme(text)
    if not scheme or not text.partition("://")[2].strip("/"):
        raise UserError(f"{option}: {text[:_SHOWN]} is no address in a bucket, such as gs://bucket/folder")
    package, extra = BUCKETS[scheme]
    if not importlib.util.find_spec(package):
        raise UserError(f"{option}: {text[:_SHOWN]} needs the package {package}: pip install 'adaptive-lm[{extra}]'")
    import fsspec
    from etils import epath

    for name in (scheme, package):  # what other processes write is to be seen at once
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return epath.Path(f"{scheme}://{text.partition('://')[2].rstrip('/')}")


def absolute(path: Any) -> Any:
    """The path from the root of this machine; an address in a bucket as it is."""
    return path if bucket_scheme(str(path)) else Path(path).absolute()


def _unusable(text: str) -> str:
    """Why no file can have the path `text`; empty where one can."""
    try:
        name = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:
        return "it holds characters that no name can"
    if not text:
        return "it is empty"
    if name > _LONGEST_NAME or len(text) > _LONGEST_PATH:
        return "it is too long"
    return "it holds a zero byte" if "\0" in text else ""


def _but_for(scheme: str) -> str:
    return " here" if scheme in BUCKETS else f", and those in buckets ({', '.join(f'{each}://' for each in BUCKETS)})"


def _of_address(text: str, option: str) -> Path:
    found = _ADDRESS.fullmatch(text)
    assert found is not None
    scheme, slashes, rest = found[1].lower(), found[2], unquote(found[3])
    if scheme != "file":
        raise UserError(
            f"{option}: {text} is an address, and only paths on this machine work{_but_for(scheme)}: copy it here, or "
            "mount it as a folder and give that"
        )
    host, slash, path = rest.partition("/") if slashes == "//" else ("", "/", rest)
    if host not in ("", "localhost") or not slash:
        raise UserError(f"{option}: {text} names a file of another machine; a file of this one is file:///path")
    return Path("/" + path)
