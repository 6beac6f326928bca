import gzip
import json
import lzma

import numpy as np
import pytest

from adaptive.data.corpus import CORPORA, embedded_corpus
from adaptive.data.sources import find_files, read_documents
from adaptive.errors import DataError

DOCUMENTS = ["one\nline two", "你好", "three"]


def read(path, **options) -> list:
    return list(read_documents(find_files(str(path)), **options))


def test_text_is_split_at_marker_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{text}\n<|endoftext|>\n" for text in DOCUMENTS))
    assert read(file) == DOCUMENTS
    file.write_text("one <|endoftext|> still\n<|endoftext|>\n\n<|endoftext|>\ntwo, not closed\n")
    assert read(file) == ["one <|endoftext|> still", "two, not closed\n"]


def test_text_without_marker_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffline\r\nother\r\n".encode())
    assert read(file) == ["line\r\nother\r\n"]


def test_windows_line_ends_around_markers(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n<|endoftext|>\r\ntwo\r\n<|endoftext|>\r\n")
    assert read(file) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl(tmp_path, suffix):
    raw = "\n".join(json.dumps({"body": text, "n": 1}) for text in DOCUMENTS).encode() + b"\n\n"
    packers = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress}
    if suffix == ".zst":
        packers[suffix] = pytest.importorskip("zstandard").ZstdCompressor().compress
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(packers[suffix](raw))
    assert read(file, text_key="body") == DOCUMENTS
    if suffix:
        file.write_bytes(packers[suffix](raw) + packers[suffix](raw))
        assert read(file, text_key="body") == DOCUMENTS * 2
        file.write_bytes(packers[suffix](raw * 500)[:-20])
        with pytest.raises(DataError, match="damaged or cut short"):
            read(file, text_key="body")


def test_parquet_text_and_tokens(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*DOCUMENTS, None, ""], "input_ids": [[1, 2], [3], [4, 5], [], None]})
    parquet.write_table(table, file, row_group_size=2)
    assert read(file) == DOCUMENTS
    tokens = read(file, text_key="input_ids")
    assert [ids.tolist() for ids in tokens] == [[1, 2], [3], [4, 5]] and tokens[0].dtype == np.int32
    with pytest.raises(DataError, match="no column 'body'; there are text, input_ids"):
        read(file, text_key="body")
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable parquet"):
        read(file)


def test_folders_and_globs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "deep" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "ignored.md").write_text("no")
    (tmp_path / ".hidden.txt").write_text("no")
    assert read(tmp_path) == ["b", "a"]
    assert read(tmp_path / "*.txt") == ["b"]
    assert read(tmp_path / "**" / "*.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"", "is empty"),
        ("a.docx", b"x", "unknown kind of file; known are .txt"),
        ("a.txt", b"fine\n<|endoftext|>\nok \xff bad", r"a\.txt is not UTF-8: byte 22 is 0xff"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}\n', r"a\.jsonl:2: no key 'text'; there are body, id"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' is int"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="the folder holds no"):
        find_files(str(tmp_path))
    with pytest.raises(DataError, match="no file matches"):
        find_files(str(tmp_path / "*.txt"))


def test_embedded_corpora_hold_what_their_notice_says(tmp_path):
    counts = {"english": (167, 2_143_467), "python": (40, 1_200_132), "chinese": (913, 1_118_157), "dna": (24, 393_576)}
    assert set(counts) == set(CORPORA)
    for name, (documents, size) in counts.items():
        file = embedded_corpus(name, str(tmp_path))
        assert file.stat().st_size == size
        texts = list(read_documents([file]))
        assert len(texts) == documents
        assert not any("<|endoftext|>" in text.splitlines() for text in texts)
    with pytest.raises(DataError, match="english, python, chinese, dna"):
        embedded_corpus("klingon")
