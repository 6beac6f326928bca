"""Documents out of files: text, JSON lines and parquet, one file, a folder or a glob of them."""

import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.errors import DataError

# A document is text, or the ids of its tokens (i32[tokens], without an end-of-text token).
Document = str | np.ndarray

MARKER = b"<|endoftext|>"
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SUFFIXES = (".txt", *_JSONL, ".parquet")


def find_files(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files `path` means: itself, what a glob matches, or every file below a folder with one of `suffixes`.

    Sorted by name, hidden files left out. Raises DataError when there is none, or when a named file is empty.
    """
    expanded = str(Path(path).expanduser())
    if Path(expanded).is_dir():
        below = (entry for entry in Path(expanded).rglob("*") if entry.is_file())
        found = sorted(f for f in below if f.name.endswith(suffixes) and not f.name.startswith("."))
        missing = f"the folder holds no {', '.join(suffixes)} file"
    elif glob.has_magic(expanded) and not Path(expanded).exists():
        found = [Path(match) for match in sorted(glob.glob(expanded, recursive=True)) if Path(match).is_file()]
        missing = "no file matches"
    else:
        found = [Path(expanded)] if Path(expanded).is_file() else []
        missing = f"no such file or folder (looked in {Path.cwd()})"
    if not found:
        raise DataError(f"data.paths: {path}: {missing}")
    for file in found:
        if not file.name.endswith(suffixes):
            raise DataError(f"data.paths: {file}: unknown kind of file; known are {', '.join(suffixes)}")
        if file.stat().st_size == 0:
            raise DataError(f"data.paths: {file} is empty")
    return found


def read_documents(files: Iterable[Path], text_key: str = "text") -> Iterator[Document]:
    """The documents of `files`, in order; documents without text are left out.

    Text files close a document with a line `<|endoftext|>`; without one the file is one document. JSON lines and
    parquet hold one document a row in `text_key`; a parquet column of integer lists is taken as tokens.
    Raises DataError naming the file and the line or byte for what cannot be read.
    """
    for file in files:
        if file.name.endswith(_JSONL):
            rows: Iterator[Document] = _jsonl(file, text_key)
        elif file.suffix == ".parquet":
            rows = _parquet(file, text_key)
        else:
            rows = _text(file)
        for document in rows:
            if len(document):
                yield document


def _text(file: Path) -> Iterator[str]:
    lines: list[bytes] = []
    start = position = 0
    with file.open("rb") as stream:
        for line in stream:
            position += len(line)
            if line.rstrip(b"\r\n") == MARKER:
                yield _join(lines, file, start, closed=True)
                lines, start = [], position
            else:
                lines.append(line)
    if any(line.strip() for line in lines):
        yield _join(lines, file, start, closed=False)


def _join(lines: list[bytes], file: Path, start: int, closed: bool) -> str:
    """The text of one document; the line break before the marker belongs to the marker."""
    content = b"".join(lines)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(f"{file} is not UTF-8: byte {at} is 0x{content[error.start]:02x} ({error.reason})") from None
    if start == 0:
        text = text.removeprefix("\ufeff")
    return text.removesuffix("\n").removesuffix("\r") if closed else text


def _open(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".xz":
        return lzma.open(file, "rb")
    if file.suffix != ".zst":
        return file.open("rb")
    return io.BufferedReader(_ZstdFile(file), buffer_size=1 << 20)


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file, one after the other; EOFError where the last one is cut short.

    The library's own reader ends in silence there, and by default after the first frame.
    """

    def __init__(self, file: Path):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{file} needs a package: pip install 'adaptive[hf]'") from None
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


def _decompression_errors() -> tuple[type[Exception], ...]:
    known: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return known
    return (*known, zstandard.ZstdError)


def _jsonl(file: Path, key: str) -> Iterator[str]:
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _row_text(line, key, f"{file}:{number}")
    except _decompression_errors() as error:
        raise DataError(f"{file} is damaged or cut short after line {number}: {error}") from None


def _row_text(line: bytes, key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with the key '{key}', found {type(row).__name__}")
    if key not in row:
        raise DataError(f"{where}: no key '{key}'; there are {', '.join(row) or 'none'} (set data.text_key)")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: '{key}' is {type(row[key]).__name__}, expected text")
    return row[key]


def _parquet(file: Path, key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file} needs a package: pip install 'adaptive[hf]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _columns(table, file, key, pyarrow.types)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from None


def _columns(table: Any, file: Path, key: str, types: Any) -> Iterator[Document]:
    schema = table.schema_arrow
    if key not in schema.names:
        raise DataError(f"{file}: no column '{key}'; there are {', '.join(schema.names)} (set data.text_key)")
    kind = schema.field(key).type
    tokens = (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type)
    if not tokens and not types.is_string(kind) and not types.is_large_string(kind):
        raise DataError(f"{file}: column '{key}' is {kind}, expected text or lists of integers")
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for value in batch.column(0):
            if value.is_valid:
                yield np.asarray(value.values, np.int32) if tokens else value.as_py()
