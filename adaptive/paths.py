"""What a user names: a place on this machine, or an address of another.

Imports nothing but the standard library.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from adaptive.errors import UserError

# One letter alone is a drive of Windows; `./a://b` is a path whatever its name.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux and of macOS
_SHOWN = 60  # characters of a text in a message


def is_address(text: str) -> bool:
    """Whether `text` is an address such as gs://bucket/folder, file:///folder included."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and (found[2] == "//" or found[1].lower() == "file")


def local_path(text: str, option: str) -> Path:
    """The path on this machine that `text` means: `~` is the home folder, file:///a/b is /a/b; globs stay as they are.

    option  how the user gave it, as in `--workdir` or `data.paths`; messages begin with it

    Raises UserError for an address of another place (gs://, s3://, hf://, https://), for `~` where no home folder is
    known, for no text at all, and for what no path can hold.
    """
    if why := _unusable(text):
        raise UserError(f"{option}: {text[:_SHOWN]!r} is no path: {why}")
    if is_address(text):
        return _of_address(text, option)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{option}: {text}: the home folder that ~ stands for is not known; write it out") from None


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


def _of_address(text: str, option: str) -> Path:
    found = _ADDRESS.fullmatch(text)
    assert found is not None
    scheme, slashes, rest = found[1].lower(), found[2], unquote(found[3])
    if scheme != "file":
        raise UserError(
            f"{option}: {text} is an address, and only paths on this machine work: copy it here, or mount it as a "
            "folder and give that"
        )
    host, slash, path = rest.partition("/") if slashes == "//" else ("", "/", rest)
    if host not in ("", "localhost") or not slash:
        raise UserError(f"{option}: {text} names a file of another machine; a file of this one is file:///path")
    return Path("/" + path)
