"""Compressed files as streams of what they hold: gzip, bzip2, xz and zstd."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

from adaptive.errors import DataError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def open_file(file: Path) -> io.BufferedIOBase:
    """The bytes of `file`, decompressed where its name ends in one of SUFFIXES, in any case of letters.

    Raises DataError where a package is missing; reading raises one of `errors` where the file is damaged.
    """
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file, "rb")
    if suffix == ".bz2":
        return bz2.open(file, "rb")
    if suffix == ".xz":
        return lzma.open(file, "rb")
    if suffix != ".zst":
        return file.open("rb")
    return io.BufferedReader(_ZstdFile(file), buffer_size=1 << 20)


def errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises, or one cut short, or one that the disk does not give."""
    known: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return known
    return (*known, zstandard.ZstdError)


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file, one after the other; EOFError where the last one is cut short.

    The library's own reader ends in silence there, and by default after the first frame.
    """

    def __init__(self, file: Path):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{file} needs a package: pip install 'adaptive-lm[hf]'") from None
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # the frame being read
        self._file = file.open("rb")
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 17)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed data ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
