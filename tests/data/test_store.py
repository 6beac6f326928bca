import json
import os
import threading
import time

import numpy as np
import pytest

from adaptive.data import prepare as prepare_module
from adaptive.data import store as store_module
from adaptive.data.documents import Textless
from adaptive.data.prepare import cached_store, prepare
from adaptive.data.store import open_store, token_dtype, write_store
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError

DOCUMENTS = ["one", "two 你好", "three and more", "x"]


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


def write(directory, documents, tokenizer, **options):
    write_store(directory, documents, tokenizer, sources=[{"path": "here"}], options={}, **options)


def leftovers(folder) -> list:
    return [entry for entry in folder.iterdir() if ".tmp" in entry.name]


@pytest.mark.parametrize("shard_tokens", [1, 10, 1 << 20])
def test_documents_come_back_from_any_sharding(tmp_path, tokenizer, shard_tokens):
    write(tmp_path / "s", DOCUMENTS, tokenizer, shard_tokens=shard_tokens)
    store = open_store(tmp_path / "s", tokenizer)
    flat = np.concatenate(tokenizer.encode_documents(DOCUMENTS))
    assert len(store) == len(flat) and store.max_id == 256
    for d, text in enumerate(DOCUMENTS):
        tokens = store.read(*store.documents[d : d + 2])
        assert tokens[-1] == tokenizer.eos_id and tokenizer.decode(tokens) == text
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, stop = np.sort(rng.choice(len(flat) + 1, 2, replace=False))
        np.testing.assert_array_equal(store.read(start, stop), flat[start:stop])


def test_index_accounts_for_the_text(tmp_path, tokenizer):
    write(tmp_path / "s", DOCUMENTS, tokenizer, shard_tokens=10)
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert sum(shard["bytes"] for shard in index["shards"]) == len("".join(DOCUMENTS).encode())
    assert sum(shard["documents"] for shard in index["shards"]) == len(DOCUMENTS)
    assert index["tokenizer"]["sha256"] == tokenizer.fingerprint


def test_smallest_type():
    assert [token_dtype(size).itemsize for size in (256, 257, 65_536, 65_537)] == [1, 2, 2, 4]


def test_another_tokenizer_is_refused_by_both_names(tmp_path, tokenizer):
    write(tmp_path / "s", DOCUMENTS, tokenizer)
    with pytest.raises(DataError, match=r"tokenizer bytes .*the recipe has hnet-bytes"):
        open_store(tmp_path / "s", load_tokenizer("hnet-bytes"))


def test_failure_leaves_nothing(tmp_path, tokenizer):
    def documents():
        yield "good"
        raise DataError("bad line")

    with pytest.raises(DataError, match="bad line"):
        write(tmp_path / "s", documents(), tokenizer)
    with pytest.raises(DataError, match="no text found"):
        write(tmp_path / "s", [], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_is_explained_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store_module, "sync", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.cache_dir"):
        write(tmp_path / "s", DOCUMENTS, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_removed_when_old(tmp_path, tokenizer):
    for name, age in ((".s.1-aa.tmp", 10 * 24 * 3600), (".s.2-bb.tmp", 60), (".other.1-aa.tmp", 10 * 24 * 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens-00000.bin").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "s", DOCUMENTS, tokenizer)
    assert {entry.name for entry in tmp_path.iterdir()} == {"s", ".s.2-bb.tmp", ".other.1-aa.tmp"}


def test_several_writers_of_one_store(tmp_path, tokenizer):
    errors = []

    def work():
        try:
            write(tmp_path / "s", DOCUMENTS * 50, tokenizer)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not leftovers(tmp_path)
    assert len(open_store(tmp_path / "s", tokenizer).documents) == 201


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "not a token store"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json is damaged"),
        (lambda folder: (folder / "tokens-00000.bin").unlink(), "is missing"),
        (lambda folder: (folder / "tokens-00000.bin").write_bytes(b"xx"), "has 2 bytes, its index says"),
        (lambda folder: (folder / "docs-00000.npy").write_bytes(b"xx"), "cannot be read"),
    ],
)
def test_damaged_stores(tmp_path, tokenizer, damage, message):
    write(tmp_path / "s", DOCUMENTS, tokenizer)
    damage(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        open_store(tmp_path / "s", tokenizer)


def test_newer_format_is_refused(tmp_path, tokenizer):
    write(tmp_path / "s", DOCUMENTS, tokenizer)
    path = tmp_path / "s" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_store(tmp_path / "s", tokenizer)


def test_cache_follows_the_source_and_the_tokenizer(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("first")

    def read(tokenizer=tokenizer):
        store = cached_store([file], tokenizer, cache=str(tmp_path / "cache"))
        return tokenizer.decode(store.read(0, len(store)))

    assert read() == "first"
    folders = list((tmp_path / "cache" / "tokens").iterdir())
    assert read() == "first" and list((tmp_path / "cache" / "tokens").iterdir()) == folders
    file.write_text("other, longer")
    assert read() == "other, longer"
    assert read(load_tokenizer("hnet-bytes")) == "other, longer"
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 3


def test_cache_follows_how_files_are_read(tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "title": "two"}', encoding="utf-8")
    for _ in range(2):
        cached_store([file], tokenizer, cache=str(tmp_path / "cache"))
    cached_store([file], tokenizer, cache=str(tmp_path / "cache"), text_key="title")
    for number in ("FORMAT", "_READING"):
        monkeypatch.setattr(prepare_module, number, 99)
        cached_store([file], tokenizer, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4


def test_cache_follows_the_content_of_a_source_of_the_same_size_and_age(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("first", encoding="utf-8")
    before = file.stat()

    def read():
        store = cached_store([file], tokenizer, cache=str(tmp_path / "cache"))
        return tokenizer.decode(store.read(0, len(store)))

    assert read() == "first"
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # as coarse as the clock of the file system
        file.write_text("other", encoding="utf-8")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read() == "other"


def test_records_without_text_are_counted(tmp_path, tokenizer):
    records = [Textless(("id",)), "one", Textless(), Textless(), "two", Textless(("id",)), Textless()]
    for shard_tokens in (1, 100):
        write(tmp_path / str(shard_tokens), records, tokenizer, shard_tokens=shard_tokens)
        store = open_store(tmp_path / str(shard_tokens), tokenizer)
        assert (len(store.documents) - 1, store.empty, store.keyless) == (2, 3, 2)
        assert len(store.shards) == (2 if shard_tokens == 1 else 1)


@pytest.mark.parametrize("index", [[], {"version": 2, "shards": []}, {"format": 1}, {"format": 1, "tokenizer": []}])
def test_an_index_of_another_program(tmp_path, tokenizer, index):
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=r"index\.json is (of another program|damaged)"):
        open_store(tmp_path, tokenizer)


@pytest.mark.parametrize("change", [{"shards": []}, {"shards": [{}]}, {"shards": 3}, {"dtype": "x"}, {"tokenizer": {}}])
def test_a_damaged_index(tmp_path, tokenizer, change):
    write(tmp_path / "s", DOCUMENTS, tokenizer)
    path = tmp_path / "s" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(DataError, match=r"index\.json is damaged .*: prepare the store again"):
        open_store(tmp_path / "s", tokenizer)


def test_same_text_has_the_same_fingerprint_anywhere(tmp_path, tokenizer):
    prints = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("same")
        prints.add(cached_store([tmp_path / name / "x.txt"], tokenizer, cache=str(tmp_path / "cache")).fingerprint)
    assert len(prints) == 1


def test_prepare_does_not_overwrite(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("text")
    (tmp_path / "out").mkdir()
    prepare([file], tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="not empty"):
        prepare([file], tokenizer, tmp_path / "out")


def test_ready_tokens_must_be_of_the_tokenizer(tmp_path, tokenizer):
    write(tmp_path / "s", [np.array([1, 2], np.int32), np.array([3, 256], np.int32), "a"], tokenizer)
    store = open_store(tmp_path / "s", tokenizer)
    assert store.read(0, len(store)).tolist() == [1, 2, 256, 3, 256, 97, 256]
    with pytest.raises(DataError, match="token ids from 5 to 50256"):
        write(tmp_path / "t", [np.array([5, 50256], np.int32)], tokenizer)
