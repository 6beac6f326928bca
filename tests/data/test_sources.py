import bz2
import gzip
import json
import lzma

import pytest

from adaptive.data.corpus import CORPORA, embedded_corpus
from adaptive.data.documents import Textless
from adaptive.data.sources import find_files, read_documents, read_records
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


def packed(content: bytes, name: str) -> bytes:
    """The content as a file of this name has it."""
    if name.lower().endswith(".zst"):
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return next((pack(content) for end, pack in packers.items() if name.lower().endswith(end)), content)


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
def test_rows_of_json(tmp_path, kind, packing):
    raw = "\n".join(json.dumps({"body": text, "n": 1}) for text in DOCUMENTS).encode() + b"\n\n"
    file = tmp_path / f"a{kind}{packing}"
    file.write_bytes(packed(raw, file.name))
    assert read(file, text_key="body") == DOCUMENTS
    if packing:
        file.write_bytes(packed(raw, file.name) + packed(raw, file.name))
        assert read(file, text_key="body") == DOCUMENTS * 2
        file.write_bytes(packed(raw * 500, file.name)[:-20])
        with pytest.raises(DataError, match="damaged or cut short"):
            read(file, text_key="body")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.txt.gz", "a.md.bz2", "A.Txt.XZ", "a.txt.zst"])
def test_text_by_any_name(tmp_path, name):
    raw = "".join(f"{text}\n<|endoftext|>\n" for text in DOCUMENTS).encode()
    (tmp_path / name).write_bytes(packed(raw, name))
    assert read(tmp_path / name) == read(tmp_path) == DOCUMENTS
    if "." in name[2:-3]:
        (tmp_path / name).write_bytes(packed(raw * 500, name)[:-20])
        with pytest.raises(DataError, match="damaged or cut short after byte"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text} for text in DOCUMENTS]),
        json.dumps([{"text": text} for text in DOCUMENTS], indent=2),
        "\n\n" + "\n".join(json.dumps({"text": text}) for text in DOCUMENTS),
    ],
)
def test_json_is_rows_or_one_list_of_them(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert read(tmp_path / "a.json") == DOCUMENTS


def test_json_over_several_lines_is_one_record(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=2), encoding="utf-8")
    assert read(tmp_path / "a.json") == ["one"]
    (tmp_path / "a.json").write_text(json.dumps({"splits": {}, "version": 1}, indent=2), encoding="utf-8")
    assert records(tmp_path / "a.json") == [Textless(("splits", "version"))]
    (tmp_path / "a.json").write_text('\n[{"text": "one"},\n {"text": }]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: malformed JSON: .* at line 3, column 11"):
        read(tmp_path / "a.json")


def records(path, **options) -> list:
    return list(read_records(find_files(str(path)), **options))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n{"id": 7, "url": ""}\n{"text": ""}\n{"text": "two"}\n'),
        ("a.json", b'[{"text": "one"}, {"text": null}, {"id": 7, "url": ""}, {"text": ""}, {"text": "two"}]'),
    ],
)
def test_records_without_text_are_told_apart(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert records(tmp_path / name) == ["one", Textless(), Textless(("id", "url")), Textless(), "two"]
    assert read(tmp_path / name) == ["one", "two"]


def test_files_without_content_are_records_without_text(tmp_path):
    for name in ("a.jsonl", "b.txt", "c.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").write_text("\n\n", encoding="utf-8")
    (tmp_path / "e.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "f.txt").write_text("<|endoftext|>\none\n<|endoftext|>\n\n", encoding="utf-8")
    (tmp_path / "g.json").write_text("[]", encoding="utf-8")
    assert records(tmp_path) == [Textless()] * 6 + ["one", Textless()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"", "is empty"),
        ("a.docx", b"x", "unknown kind of file; known are .txt"),
        ("a.txt", b"fine\n<|endoftext|>\nok \xff bad", r"a\.txt is not UTF-8: byte 22 is 0xff"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", b'\n{"text": 3, "id": 1}\n', r"a\.jsonl:2: 'text' is int, .*the keys are text, id"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ' + b"[" * 100_000, r"a\.jsonl:2: malformed JSON: nested too deeply"),
        ("a.jsonl", b'{"text": "ok", "n": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: .* a whole number of too many digits"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ],
)
def test_bad_input(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


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
