import os
import struct

import numpy as np
import pytest

from adaptive.data.config import DataConfig
from adaptive.data.foreign import open_tokens
from adaptive.data.pipeline import open_data
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError

END = 256
FLAT = np.array([1, 2, END, 3, END, 4, 5, 6], np.int32)


@pytest.fixture
def read(tmp_path):
    def reader(path, token_dtype="uint16"):
        return open_tokens(str(path), load_tokenizer("bytes"), token_dtype, str(tmp_path / "cache"))

    return reader


def check(store, tokens=FLAT, documents=(0, 3, 5, 8)):
    assert store.read(0, len(store)).tolist() == list(tokens)
    assert store.documents.tolist() == list(documents)
    assert store.max_id == max(tokens)


def llm_c(tokens, dtype="<u2", magic=20240520, version=1) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype).tobytes()


def megatron(folder, documents, code=8, dtype="<u2"):
    lengths = [len(document) for document in documents]
    tokens = np.concatenate(documents).astype(dtype)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * tokens.itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    index += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    index += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    (folder / "m.idx").write_bytes(index)
    (folder / "m.bin").write_bytes(tokens.tobytes())


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt(tmp_path, read, dtype):
    (tmp_path / "train.bin").write_bytes(FLAT.astype(dtype).tobytes())
    for _ in range(2):  # the second time from what was remembered
        check(read(tmp_path / "train.bin", dtype))


@pytest.mark.parametrize(("dtype", "magic", "version"), [("<u2", 20240520, 1), ("<u4", 20240801, 7)])
def test_llm_c_shards(tmp_path, read, dtype, magic, version):
    for i, part in enumerate((FLAT[:5], FLAT[5:])):
        (tmp_path / f"fineweb_train_{i:06d}.bin").write_bytes(llm_c(part, dtype, magic, version))
    check(read(tmp_path))
    check(read(tmp_path / "fineweb_train_*.bin"))


def test_llm_c_damage(tmp_path, read):
    file = tmp_path / "a.bin"
    file.write_bytes(llm_c(FLAT)[:-2])
    with pytest.raises(DataError, match="cut short"):
        read(file)
    file.write_bytes(llm_c(FLAT, magic=20240522))
    with pytest.raises(DataError, match="evaluation file"):
        read(file)


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4")])
def test_megatron(tmp_path, read, code, dtype):
    megatron(tmp_path, [FLAT[:2], FLAT[2:6], FLAT[6:]], code, dtype)
    check(read(tmp_path / "m.bin"), documents=(0, 2, 6, 8))


def test_megatron_damage(tmp_path, read):
    megatron(tmp_path, [FLAT[:2], FLAT[2:]])
    (tmp_path / "m.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="does not hold the 8 tokens"):
        read(tmp_path / "m.bin")
    index = (tmp_path / "m.idx").read_bytes()
    (tmp_path / "m.idx").write_bytes(index[:50])
    with pytest.raises(DataError, match="cut short"):
        read(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a Megatron index"):
        read(tmp_path / "m.bin")


@pytest.mark.parametrize("documents", [[0, 1, 7], [1, 2], [0, 1], [0, 2, 1, 2], [0, -1, 2], []])
def test_megatron_documents_that_are_not_its_sequences(tmp_path, read, documents):
    megatron(tmp_path, [FLAT[:2], FLAT[2:]])
    head = (tmp_path / "m.idx").read_bytes()[: 34 + 12 * 2]
    head = head[:26] + struct.pack("<Q", len(documents)) + head[34:]
    (tmp_path / "m.idx").write_bytes(head + np.array(documents, "<i8").tobytes())
    with pytest.raises(DataError, match=r"m\.idx is damaged: its documents are not its 2 sequences in order"):
        read(tmp_path / "m.bin")


def test_a_changed_index_is_read_again(tmp_path, read):
    megatron(tmp_path, [FLAT[:2], FLAT[2:6], FLAT[6:]])
    check(read(tmp_path / "m.bin"), documents=(0, 2, 6, 8))
    index = (tmp_path / "m.idx").read_bytes()
    (tmp_path / "m.idx").write_bytes(index[:-32] + np.array([0, 1, 1, 3], "<i8").tobytes())
    check(read(tmp_path / "m.bin"), documents=(0, 2, 2, 8))


def test_empty_token_files_of_a_folder_are_passed_over(tmp_path, read):
    (tmp_path / "a.bin").touch()
    (tmp_path / "b.bin").touch()
    with pytest.raises(DataError, match="every token file is empty"):
        read(tmp_path)
    (tmp_path / "b.bin").write_bytes(FLAT.astype(np.uint16).tobytes())
    check(read(tmp_path))


@pytest.mark.parametrize("wide", [2**31, 2**32 + 5, 2**63 - 1])
def test_ids_wider_than_32_bits_are_not_cut(tmp_path, read, wide):
    np.save(tmp_path / "a.npy", np.array([1, wide], np.int64))
    with pytest.raises(DataError, match=f"holds token id {wide}"):
        read(tmp_path / "a.npy")


def test_npy_with_and_without_header(tmp_path, read):
    np.save(tmp_path / "a.npy", FLAT.astype(np.uint32))
    check(read(tmp_path / "a.npy"))
    (tmp_path / "b.npy").write_bytes(FLAT.astype(np.uint16).tobytes())
    check(read(tmp_path / "b.npy"))
    np.save(tmp_path / "a.npy", FLAT.reshape(2, 4))
    with pytest.raises(DataError, match=r"int32\[2, 4\], expected one axis"):
        read(tmp_path / "a.npy")


def test_wrong_type_or_vocabulary_is_refused(tmp_path, read):
    file = tmp_path / "a.bin"
    file.write_bytes(np.array([1, 50256], np.uint16).tobytes())
    with pytest.raises(DataError, match=r"token id 50256, the tokenizer bytes has 320.*token_dtype"):
        read(file)
    file.write_bytes(b"123")
    with pytest.raises(DataError, match="3 bytes, not a whole number of uint16"):
        read(file)
    np.save(tmp_path / "a.npy", np.array([1, -1]))
    with pytest.raises(DataError, match="negative token id -1"):
        read(tmp_path / "a.npy")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "missing.bin")


def test_damaged_headers_and_memories(tmp_path, read):
    file = tmp_path / "a.npy"
    np.save(file, FLAT)
    whole = file.read_bytes()
    for content in (whole[:40], whole[:20] + b"(" * 20 + whole[40:], whole.replace(b"(8,)", b"(8;)")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npy is not a readable \.npy file|a\.npy holds"):
            read(file)
    (tmp_path / "b.bin").write_bytes(FLAT.astype(np.uint16).tobytes())
    check(read(tmp_path / "b.bin"))
    (known,) = (tmp_path / "cache" / "scans").glob("b-*")
    known.write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"what was remembered of .*b\.bin is damaged .*: remove .*\.npz"):
        read(tmp_path / "b.bin")


def test_a_changed_file_is_read_again(tmp_path, read):
    file = tmp_path / "a.bin"
    file.write_bytes(FLAT.astype(np.uint16).tobytes())
    first = read(file).fingerprint
    file.write_bytes(np.append(FLAT, 7).astype(np.uint16).tobytes())
    second = read(file)
    assert second.max_id == END and len(second) == 9 and second.fingerprint != first


def test_content_of_the_same_size_and_age_is_read_again(tmp_path, read):
    file = tmp_path / "a.bin"
    file.write_bytes(FLAT.astype(np.uint16).tobytes())
    first, before = read(file), file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # as coarse as the clock of the file system
        file.write_bytes(FLAT[::-1].astype(np.uint16).tobytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert read(file).documents.tolist() == [0, 4, 6, 8] != first.documents.tolist()


def test_trains_on_foreign_tokens(tmp_path):
    rng = np.random.default_rng(0)
    rng.integers(0, END + 1, 4000).astype(np.uint16).tofile(tmp_path / "a.bin")
    config = DataConfig(source="tokens", paths=(str(tmp_path / "a.bin"),), seq_len=16, cache_dir=str(tmp_path / "c"))
    data = open_data(config, batch_size=4, vocab_size=320)
    train = data.train()
    assert next(train).tokens.shape == (4, 16)
    train.close()
    assert "begins" in "\n".join(data.describe())
