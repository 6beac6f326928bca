"""Parquet columns: text in any type of Arrow, lists of token ids, and what is neither."""

import numpy as np
import pytest

from adaptive.data.documents import Textless
from adaptive.data.parquet import read_parquet
from adaptive.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one\nline two", "你好", None, "", "one\nline two"]


def read(tmp_path, column, key="column") -> list:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"column": column, "id": [7] * len(column)}), file, row_group_size=2)
    return list(read_parquet(file, key))


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_text(tmp_path, kind):
    expected = ["one\nline two", "你好", Textless(), "", "one\nline two"]
    column = pyarrow.array(TEXTS, pyarrow.string())
    column = column.dictionary_encode().cast(kind) if pyarrow.types.is_dictionary(kind) else column.cast(kind)
    assert read(tmp_path, column) == expected


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.binary(6)], ids=str
)
def test_bytes_of_text(tmp_path, kind):
    assert read(tmp_path, pyarrow.array(["你好".encode(), None], kind)) == ["你好", Textless()]
    with pytest.raises(DataError, match=r"a\.parquet: row 2 of 'column' is not UTF-8: byte 3"):
        read(tmp_path, pyarrow.array([b"\x00\x01good"[:6], b"fin\xffe!"], kind))


def test_text_that_is_no_utf8(tmp_path):
    raw = pyarrow.array([b"fine", b"fin\xff"])
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    with pytest.raises(DataError, match=r"a\.parquet: row 2 of 'column' is not UTF-8: byte 3"):
        read(tmp_path, column)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(pyarrow.int64()),
        pyarrow.large_list(pyarrow.uint16()),
        pyarrow.list_(pyarrow.int32(), 2),
        pyarrow.list_(pyarrow.uint64()),
    ],
    ids=str,
)
def test_tokens(tmp_path, kind):
    first, nothing, last = read(tmp_path, pyarrow.array([[1, 2], None, [3, 65_535]], kind))
    assert first.tolist() == [1, 2] and nothing == Textless() and last.tolist() == [3, 65_535]
    assert first.dtype == np.int32


@pytest.mark.parametrize(
    ("ids", "message"), [([5, 2**32 + 5], "holds 4294967301"), ([1, None], "lacks some"), ([-1, 2], "holds -1")]
)
def test_ids_that_are_none(tmp_path, ids, message):
    with pytest.raises(DataError, match=rf"row 2 of 'column' {message}"):
        read(tmp_path, pyarrow.array([[1, 2], ids], pyarrow.list_(pyarrow.int64())))


def test_rows_without_the_column(tmp_path):
    assert read(tmp_path, ["a", "b"], key="text") == [Textless(("column", "id"))] * 2
    assert read(tmp_path, pyarrow.nulls(2)) == [Textless()] * 2


@pytest.mark.parametrize("column", [[1, 2], [1.5, 2.5], [["a"], ["b"]], [{"a": 1}, {"a": 2}]], ids=str)
def test_other_types(tmp_path, column):
    with pytest.raises(DataError, match=r"a\.parquet: column 'column' is .*, expected text or lists of integers"):
        read(tmp_path, column)


def test_damage(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"column": ["text"] * 5000}), file)
    whole = file.read_bytes()
    for content in (b"PAR1 but not really", whole[:50], whole[:20] + b"\xff" * 40 + whole[60:]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not a readable parquet"):
            list(read_parquet(file, "column"))
