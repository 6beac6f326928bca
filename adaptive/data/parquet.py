"""A column of a parquet file: text in any type that Arrow has for it, or lists of token ids."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.data.documents import Document, Textless
from adaptive.errors import DataError

_LARGEST_ID = np.iinfo(np.int32).max
_ROWS_AT_ONCE = 256


def read_parquet(file: Path, key: str) -> Iterator[Document | Textless]:
    """The column `key` row by row: strings, UTF-8 bytes, or lists of integers, plain or as a dictionary.

    Raises DataError naming the file, and the row where one is at fault, for other types, bytes that are no UTF-8, ids
    that are missing or out of range, and files that cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file} needs a package: pip install 'adaptive-lm[hf]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _rows(table, file, key, pyarrow)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from None


def _rows(table: Any, file: Path, key: str, pyarrow: Any) -> Iterator[Document | Textless]:
    names = table.schema_arrow.names
    if key not in names:
        yield from itertools.repeat(Textless(tuple(names)), table.metadata.num_rows)
        return
    read = _reader(table.schema_arrow.field(key).type, pyarrow)
    if read is None:
        kind = table.schema_arrow.field(key).type
        raise DataError(f"{file}: column '{key}' is {kind}, expected text or lists of integers")
    number = itertools.count(1)
    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[key]):
        column = batch.column(0)
        if isinstance(column.type, pyarrow.BaseExtensionType):
            column = column.storage
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        for value, row in zip(column, number, strict=False):
            yield read(value, f"{file}: row {row} of '{key}'") if value.is_valid else Textless()


def _reader(kind: Any, pyarrow: Any) -> Any:
    """What reads a value of this type; None for a type that holds no text."""
    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    raw = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    lists = (
        types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view,
    )  # fmt: skip
    if any(test(kind) for test in (*texts, *raw, types.is_null)):
        return _text
    if any(test(kind) for test in lists) and types.is_integer(kind.value_type):
        return _tokens
    return None


def _text(value: Any, where: str) -> str:
    try:
        content = value.as_py()
        return content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {error.start} ({error.reason})") from None


def _tokens(value: Any, where: str) -> np.ndarray:
    if value.values.null_count:
        raise DataError(f"{where} lacks some of its token ids")
    ids = value.values.to_numpy(zero_copy_only=False)
    if ids.size and (ids.min() < 0 or ids.max() > _LARGEST_ID):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(f"{where} holds {wrong}, which is no token id")
    return ids.astype(np.int32)
