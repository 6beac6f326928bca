"""Documents out of files: text, JSON lines and parquet."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adaptive.data import compressed
from adaptive.data.documents import Document, Prompted, Textless
from adaptive.data.find import PARQUET, ROWS, SUFFIXES, find, is_of
from adaptive.data.parquet import read_parquet
from adaptive.errors import DataError

MARKER = b"<|endoftext|>"


def find_files(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files `path` means; see `find`."""
    return find(path, suffixes).files


def read_documents(files: Iterable[Path], text_key: str = "text") -> Iterator[Document]:
    """The documents of `files`, in order; see `read_records`."""
    return (record for record in read_records(files, text_key) if not isinstance(record, Textless))


def read_records(files: Iterable[Path], text_key: str = "text", prompt_key: str = "") -> Iterator[Document | Textless]:
    """The records of `files`, in order: documents, and those that are none.

    Text files close a document with a line `<|endoftext|>`; without one the file is one document. JSON lines and
    parquet hold one document a row in `text_key`; a parquet column of integer lists is taken as tokens. In every format
    a record whose text is null, empty or not there is no document, and neither is a file that holds nothing.
    With a `prompt_key` each row of JSON has the text before that of `text_key` there, and its documents are `Prompted`.
    Raises DataError naming the file and the line or byte for what cannot be read.
    """
    for file in files:
        if prompt_key and not is_of(file, ROWS):
            raise DataError(f"{file}: data.prompt_key={prompt_key} needs rows of JSON, as in a .jsonl")
        if file.stat().st_size == 0:
            records: Iterator[Document | Textless] = iter(())
        elif is_of(file, PARQUET):
            records = read_parquet(file, text_key)
        elif is_of(file, ROWS):
            records = _json(file, text_key, prompt_key)
        else:
            records = _text(file)
        for record in itertools.chain([next(records, Textless())], records):
            yield record if isinstance(record, Textless) or len(record) else Textless()


# Text


def _text(file: Path) -> Iterator[str]:
    lines: list[bytes] = []
    start = position = 0
    try:
        with compressed.open_file(file) as stream:
            for line in stream:
                position += len(line)
                if line.rstrip(b"\r\n") == MARKER:
                    yield _join(lines, file, start, closed=True)
                    lines, start = [], position
                else:
                    lines.append(line)
    except compressed.errors() as error:
        raise DataError(f"{file} is damaged or cut short after byte {position}: {error}") from None
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


# JSON


def _json(file: Path, key: str, prompt_key: str) -> Iterator[Document | Textless]:
    """Rows of JSON lines; a .json may also be one array of rows, or one row over several lines."""
    number, undecided = 0, is_of(file, (".json",))
    try:
        with compressed.open_file(file) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                if undecided and not _is_object(line):
                    yield from _whole(b"\n" * (number - 1) + line + stream.read(), key, prompt_key, str(file))
                    return
                undecided = False
                yield _row(_parsed(line, f"{file}:{number}"), key, prompt_key, f"{file}:{number}")
    except compressed.errors() as error:
        raise DataError(f"{file} is damaged or cut short after line {number}: {error}") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parsed(line, ""), dict)
    except DataError:
        return False


def _whole(raw: bytes, key: str, prompt_key: str, where: str) -> Iterator[Document | Textless]:
    content = _parsed(raw, where)
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        yield _row(row, key, prompt_key, f"{where}, record {number}")


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: malformed JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: malformed JSON: nested too deeply") from None
    except ValueError:
        raise DataError(f"{where}: malformed JSON: a whole number of too many digits") from None


def _row(row: Any, key: str, prompt_key: str, where: str) -> Document | Textless:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with the key '{key}', found {type(row).__name__}")
    if key not in row:
        return Textless(tuple(row))
    if row[key] is None:
        return Textless()
    if not isinstance(row[key], str):
        raise DataError(
            f"{where}: '{key}' is {type(row[key]).__name__}, expected text (the keys are {', '.join(row)}; "
            "data.text_key names the one with the text)"
        )
    if not prompt_key or not row[key]:
        return row[key]
    if not isinstance(prompt := row.get(prompt_key), str):
        found = type(prompt).__name__ if prompt_key in row else "nothing"
        raise DataError(f"{where}: '{prompt_key}' is {found}, expected the text of a prompt (data.prompt_key)")
    return Prompted(prompt, row[key])
