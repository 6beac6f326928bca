"""Token files of other programs, opened as token stores.

    X.bin with magic   llm.c and modded-nanogpt shards: 256 int32 of header, then uint16 or uint32
    X.bin + X.idx      Megatron-LM's indexed data set
    X.bin              nanoGPT: tokens and nothing else, of the type `data.token_dtype` says
    X.npy              a numpy array, or a stream without header as OLMo writes them

Sources: karpathy/llm.c dev/data/data_common.py, karpathy/nanoGPT data/*/prepare.py, NVIDIA/Megatron-LM
megatron/core/datasets/indexed_dataset.py.
"""

import hashlib
import io
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive.data import fetch
from adaptive.data.files import ELSEWHERE, cache_dir, digest, explained, write_atomically
from adaptive.data.sources import find_files
from adaptive.data.store import TokenStore, file_identity, open_store
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError

TOKEN_SUFFIXES = (".bin", ".npy")
_LLM_C: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # magic -> type of the tokens
_LLM_C_EVALUATION = 20240522
_LLM_C_HEADER = 256 * 4
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMPY_MAGIC = b"\x93NUMPY"
_SCAN_TOKENS = 1 << 24


class _Shard(NamedTuple):
    tokens: np.ndarray
    bounds: np.ndarray  # i64[documents + 1]
    max_id: int
    sha256: str


def open_tokens(path: str, tokenizer: Tokenizer, token_dtype: str, cache: str = "") -> TokenStore:
    """The tokens at `path`: a prepared store, a token file of another program, or a folder or glob of such files.

    tokenizer    the one the tokens were made with; its end token separates documents in files that record none
    token_dtype  uint8, uint16 or uint32, of files without a header

    A file of another program is read once from end to end, for its document bounds and its largest id; the cache
    folder remembers them. Raises DataError naming the file for anything missing, malformed or of another vocabulary.
    """
    folder = fetch.here(path, "data.paths", cache)
    if (folder / "index.json").is_file():
        return open_store(folder, tokenizer)
    files = [file for file in find_files(str(folder), TOKEN_SUFFIXES) if file.stat().st_size]
    if not files:
        raise DataError(f"data.paths: {path}: every token file is empty")
    shards = [_open(file, tokenizer, np.dtype(token_dtype), cache) for file in files]
    starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
    max_id = max(shard.max_id for shard in shards)
    if max_id >= tokenizer.vocab_size:
        raise DataError(
            f"{path} holds token id {max_id}, the tokenizer {tokenizer.name} has {tokenizer.vocab_size}: set "
            f"data.tokenizer to the one it was made with, or data.token_dtype (now {token_dtype}) to its type"
        )
    bounds = [shard.bounds[1:] + start for shard, start in zip(shards, starts, strict=False)]
    return TokenStore(
        name=path,
        shards=tuple(shard.tokens for shard in shards),
        documents=np.concatenate([[0], *bounds]).astype(np.int64),
        max_id=max_id,
        fingerprint=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
    )


def _open(file: Path, tokenizer: Tokenizer, dtype: np.dtype, cache: str) -> _Shard:
    with file.open("rb") as stream:
        head = stream.read(_LLM_C_HEADER)
    if head.startswith(_NUMPY_MAGIC):
        return _scan(file, _numpy_array(file), None, tokenizer.eos_id, cache)
    if file.with_suffix(".idx").is_file():
        tokens, bounds = _megatron(file)
        return _scan(file, tokens, bounds, tokenizer.eos_id, cache)
    magic = struct.unpack("<i", head[:4])[0] if len(head) == _LLM_C_HEADER else 0
    if magic == _LLM_C_EVALUATION:
        raise DataError(f"{file} is an llm.c evaluation file; train on its token shards (fineweb_train_*.bin) instead")
    if magic in _LLM_C:
        return _scan(file, _llm_c(file, head, _LLM_C[magic]), None, tokenizer.eos_id, cache)
    return _scan(file, _headerless(file, dtype), None, tokenizer.eos_id, cache)


def _headerless(file: Path, dtype: np.dtype) -> np.ndarray:
    if file.stat().st_size % dtype.itemsize:
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, not a whole number of {dtype.name} tokens: set data.token_dtype"
        )
    return np.memmap(file, dtype.newbyteorder("<"), "r")


def _numpy_array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header also what reading Python raises
        raise DataError(f"{file} is not a readable .npy file: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(f"{file} holds {array.dtype.name}{list(array.shape)}, expected one axis of integers")
    return array


def _llm_c(file: Path, head: bytes, dtype: np.dtype) -> np.ndarray:
    count = struct.unpack("<i", head[8:12])[0]
    expected = _LLM_C_HEADER + count * dtype.itemsize
    if file.stat().st_size != expected:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes, its header says {expected:,}: it was cut short")
    return np.memmap(file, dtype, "r", offset=_LLM_C_HEADER, shape=(count,))


def _megatron(file: Path) -> tuple[np.ndarray, np.ndarray]:
    index = file.with_suffix(".idx")
    raw = index.read_bytes()
    if not raw.startswith(_MEGATRON_MAGIC) or len(raw) < 34:
        raise DataError(f"{index} is not a Megatron index (it should begin with MMIDIDX)")
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:34])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(f"{index}: version {version} with type code {code}; known are version 1 and integer types")
    if len(raw) < 34 + 12 * sequences + 8 * documents:
        raise DataError(f"{index} is cut short: {sequences} sequences do not fit in {len(raw):,} bytes")
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    first_sequences = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    whole = documents > 1 and first_sequences[0] == 0 and first_sequences[-1] == sequences
    if not whole or (np.diff(first_sequences) < 0).any() or (lengths < 0).any():
        raise DataError(f"{index} is damaged: its documents are not its {sequences:,} sequences in order")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    if file.stat().st_size < ends[-1] * dtype.itemsize or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise DataError(f"{file} does not hold the {int(ends[-1]):,} tokens in the order that {index.name} says")
    return np.memmap(file, dtype, "r", shape=(int(ends[-1]),)), ends[first_sequences]


def _scan(file: Path, tokens: np.ndarray, bounds: np.ndarray | None, eos_id: int, cache: str) -> _Shard:
    """The shard with its document bounds, found at end tokens where `bounds` is None."""
    if not len(tokens):
        raise DataError(f"{file} holds no tokens")
    ends_at = eos_id if bounds is None else hashlib.sha256(bounds.astype("<i8").tobytes()).hexdigest()
    key = digest([file_identity(file), tokens.dtype.str, len(tokens), ends_at])
    known = cache_dir(cache) / "scans" / f"{file.stem}-{key[:16]}.npz"
    if not known.exists():
        content, largest, ends = hashlib.sha256(), 0, [np.zeros(1, np.int64)]
        for start in range(0, len(tokens), _SCAN_TOKENS):
            part = np.asarray(tokens[start : start + _SCAN_TOKENS])
            content.update(part.tobytes())
            if part.min() < 0:
                raise DataError(f"{file} holds the negative token id {part.min()}")
            largest = max(largest, int(part.max()))
            if bounds is None:
                ends.append(np.flatnonzero(part == eos_id) + start + 1)
        found = np.unique(np.concatenate([*ends, [len(tokens)]])) if bounds is None else bounds
        content.update(found.astype("<i8").tobytes())
        packed = io.BytesIO()
        np.savez(packed, bounds=found, max_id=largest, sha256=content.hexdigest())
        with explained(f"remembering what is in {file}", ELSEWHERE):
            write_atomically(known, packed.getvalue())
    try:
        with np.load(known) as saved:
            return _Shard(tokens, saved["bounds"], int(saved["max_id"]), str(saved["sha256"]))
    except Exception as error:  # several kinds, by what is damaged
        raise DataError(f"what was remembered of {file} is damaged ({error}): remove {known}") from None
