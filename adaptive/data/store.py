"""The token store: documents as tokens on disk, written once, read at random.

    DIR/tokens-00000.bin ...  little-endian uint8, uint16 or uint32
    DIR/docs-00000.npy ...    i64[documents + 1], where each document of the shard begins
    DIR/prompts-00000.npy ... i64[documents], tokens at its beginning that are a prompt; where any has one
    DIR/index.json            format, dtype, tokenizer, sizes and sha256 of the shards, sources and options

A store is written in a folder under a temporary name, synced and renamed, so a folder of that name is complete.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import adaptive
from adaptive.data.documents import Document, Prompted, Textless
from adaptive.data.files import beside, explained, sync, temporary_pattern
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError

FORMAT = 1
_SHARD_TOKENS = 1 << 28
_GROUP_CHARACTERS = 1 << 22  # text encoded at once
_REPORT_EVERY_S = 10.0
_ABANDONED_AFTER_S = 7 * 24 * 3600.0
_NAMED = 3  # files in a message

log = logging.getLogger("adaptive.data")


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokens of documents, end to end, with where each document starts.

    shards       one array of unsigned integers each, usually mapped from a file
    documents    i64[documents + 1]: document d is tokens documents[d] to documents[d + 1], its end token included
    max_id       largest id in the store
    fingerprint  sha256 (hex) of the tokens, the document bounds and the prompts
    prompts      i64[documents]: tokens at the beginning of each that are read and not predicted; None: no such
    text_bytes   UTF-8 bytes of all documents, where that is known
    empty        records of its files whose text was null or empty, and files without content
    keyless      records that lacked the key of the text
    """

    name: str
    shards: tuple[np.ndarray, ...]
    documents: np.ndarray
    max_id: int
    fingerprint: str
    text_bytes: int | None = None
    empty: int = 0
    keyless: int = 0
    prompts: np.ndarray | None = None

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard) for shard in self.shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @functools.cached_property
    def _arrays(self) -> list[tuple[int, np.ndarray]]:
        """Where each shard begins, and its tokens as a plain array: slices of one that is mapped are slow to make."""
        return [(int(start), np.asarray(shard)) for start, shard in zip(self._bounds, self.shards, strict=False)]

    def read(self, start: int, stop: int) -> np.ndarray:
        """i32[stop - start] tokens from `start` on."""
        tokens = np.empty(stop - start, np.int32)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fills `out` i32[tokens] with the tokens from `start` on."""
        stop = start + len(out)
        arrays = self._arrays
        first = bisect.bisect_right(arrays, start, key=lambda array: array[0]) - 1 if len(arrays) > 1 else 0
        for begin, array in arrays[first:]:
            if begin >= stop:
                return
            low = max(start, begin)
            part = array[low - begin : stop - begin]
            out[low - start : low - start + len(part)] = part

    def predicted(self, start: int, stop: int) -> np.ndarray:
        """bool[stop - start]: whether each of these tokens belongs to no prompt."""
        position = np.arange(start, stop)
        if self.prompts is None:
            return np.ones(len(position), bool)
        document = np.searchsorted(self.documents, position, side="right") - 1
        return position - self.documents[document] >= self.prompts[document]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every id."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class _Encoded(NamedTuple):
    """A document's tokens i32[n] with those that begin and end it, the bytes of its text in UTF-8, and how many of the
    tokens are a prompt."""

    tokens: np.ndarray
    text_bytes: int
    prompt: int = 0


def write_store(
    directory: Path,
    records: Iterable[Document | Textless],
    tokenizer: Tokenizer,
    *,
    sources: list[dict],
    options: dict,
    shard_tokens: int = _SHARD_TOKENS,
) -> None:
    """Tokenises the documents of `records` into a store at `directory`, which must not exist or be an empty folder.

    sources, options  recorded in index.json as they are
    shard_tokens      a shard is closed by the document that reaches this many tokens

    Records without text are counted in index.json. Raises DataError when there is no document, when a document of
    tokens does not fit the tokenizer, or when the disk refuses. Nothing is left behind then.
    """
    remedy = "Free some space or choose another folder (data.cache_dir or ADAPTIVE_CACHE, or --out of `data prepare`)."
    with explained(f"writing the token store {directory}", remedy), _new_folder(directory) as folder:
        shards = list(_write_shards(folder, _encoded(records, tokenizer), tokenizer, shard_tokens))
        if not any(entry["documents"] for entry in shards):
            raise DataError(_no_text(shards, sources, options))
        index = {
            "format": FORMAT,
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "tokenizer": _described(tokenizer),
            "shards": shards,
            "sources": sources,
            "options": options,
            "program": f"adaptive {adaptive.__version__}",
        }
        (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        sync(folder / "index.json")


def _no_text(shards: list[dict], sources: list[dict], options: dict) -> str:
    """What to say of files whose every record is without text."""
    paths = [source["path"] for source in sources]
    where = ", ".join(paths[:_NAMED]) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")
    empty, keyless = (sum(entry[count] for entry in shards) for count in ("empty", "keyless"))
    keys = next((", ".join(entry["keys"]) for entry in shards if entry["keys"]), "none")
    lacking = f"{keyless:,} records have no '{options.get('text_key')}', only {keys} (data.text_key names the text)"
    return f"no text found in {where}: {empty:,} records or files are empty" + (f", and {lacking}" if keyless else "")


def open_store(directory: Path, tokenizer: Tokenizer) -> TokenStore:
    """The store at `directory`. Raises DataError if it is incomplete, damaged, newer, or of another tokenizer."""
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} is not a token store: it has no index.json") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{directory}/index.json is damaged: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("format"), int):
        raise DataError(f"{directory} is not a token store: its index.json is of another program")
    if index["format"] > FORMAT:
        raise DataError(f"{directory} has format {index['format']}; this program reads up to {FORMAT}: update it")
    try:
        return _opened(directory, index, tokenizer)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{directory}/index.json is damaged ({error!r}): prepare the store again") from None


def _opened(directory: Path, index: dict, tokenizer: Tokenizer) -> TokenStore:
    made_by = index["tokenizer"]
    if made_by["sha256"] != tokenizer.fingerprint:
        raise DataError(
            f"{directory} was made with the tokenizer {_named(made_by)}, the recipe has "
            f"{_named(_described(tokenizer))}: set data.tokenizer, data.bos and data.eos alike, or prepare it again"
        )
    shards, documents, start = [], [np.zeros(1, np.int64)], 0
    for i, entry in enumerate(index["shards"]):
        shard, bounds = _open_shard(directory, i, entry, np.dtype(index["dtype"]).newbyteorder("<"))
        shards.append(shard)
        documents.append(bounds[1:] + start)
        start += len(shard)
    return TokenStore(
        name=str(directory),
        shards=tuple(shards),
        documents=np.concatenate(documents),
        max_id=max(entry["max_id"] for entry in index["shards"]),
        fingerprint=hashlib.sha256("".join(entry["sha256"] for entry in index["shards"]).encode()).hexdigest(),
        text_bytes=sum(entry["bytes"] for entry in index["shards"]),
        empty=sum(entry.get("empty", 0) for entry in index["shards"]),
        keyless=sum(entry.get("keyless", 0) for entry in index["shards"]),
        prompts=_open_prompts(directory, index["shards"]),
    )


def _open_prompts(directory: Path, shards: list[dict]) -> np.ndarray | None:
    if not any(entry.get("prompts") for entry in shards):
        return None
    each = []
    for i, entry in enumerate(shards):
        path = directory / f"prompts-{i:05d}.npy"
        try:
            lengths = np.load(path) if entry.get("prompts") else np.zeros(entry["documents"], np.int64)
        except Exception as error:  # of a damaged header also what reading Python raises
            raise DataError(f"{path} cannot be read ({error}): prepare the store again") from None
        if lengths.shape != (entry["documents"],):
            raise DataError(f"{path} is of other documents than its index: prepare the store again")
        each.append(lengths)
    return np.concatenate(each)


def _described(tokenizer: Tokenizer) -> dict:
    return {
        "name": tokenizer.name,
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def _named(made_by: dict) -> str:
    begin = "none" if made_by["bos_id"] is None else made_by["bos_id"]
    return f"{made_by['name']} (begin token {begin}, end token {made_by['eos_id']}, sha256 {made_by['sha256'][:12]})"


def _open_shard(directory: Path, i: int, entry: dict, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    path = directory / f"tokens-{i:05d}.bin"
    expected = entry["tokens"] * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise DataError(f"{path} {found}, its index says {expected:,}: the store is damaged; prepare it again")
    try:
        bounds = np.load(directory / f"docs-{i:05d}.npy")
    except Exception as error:  # of a damaged header also what reading Python raises
        raise DataError(f"{directory}/docs-{i:05d}.npy cannot be read ({error}): prepare the store again") from None
    return np.memmap(path, dtype, "r"), bounds


@contextlib.contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder that becomes `directory` when the block succeeds and vanishes when it does not."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory)
    folder = beside(directory)
    folder.mkdir()
    try:
        yield folder
        sync(folder)
        # Of several processes that prepare the same store, the first to finish wins and the others use its files.
        if not (directory / "index.json").exists():
            _rename(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Removes what writers of this store left behind when they were killed, once it is surely not being written."""
    for folder in directory.parent.glob(temporary_pattern(directory)):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(folder)


def _rename(folder: Path, directory: Path) -> None:
    try:
        folder.rename(directory)
    except OSError:
        if not (directory / "index.json").exists():
            raise
    sync(directory.parent)


def _encoded(records: Iterable[Document | Textless], tokenizer: Tokenizer) -> Iterator[_Encoded | Textless]:
    """Each document encoded, in groups so that a tokenizer can use several threads."""
    group: list[str] = []
    characters = 0
    for record in records:
        if isinstance(record, Textless):
            yield record
            continue
        if isinstance(record, str):
            group.append(record)
            characters += len(record)
        if not isinstance(record, str) or characters >= _GROUP_CHARACTERS:
            yield from _encoded_group(group, tokenizer)
            group, characters = [], 0
        if isinstance(record, Prompted):
            yield _prompted(record, tokenizer)
        elif not isinstance(record, str):
            ids = _checked(record, tokenizer)
            yield _Encoded(ids, tokenizer.text_size(ids))
    yield from _encoded_group(group, tokenizer)


def _prompted(record: Prompted, tokenizer: Tokenizer) -> _Encoded:
    """Prompt and text are encoded apart, as the model will get the prompt when it generates."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = np.concatenate([np.array(begin, np.int32), tokenizer.encode(record.prompt)])
    ids = np.concatenate([prompt, tokenizer.encode(record.text), np.array([tokenizer.eos_id], np.int32)])
    text = record.prompt + record.text
    return _Encoded(ids.astype(np.int32), len(text.encode("utf-8", errors="replace")), len(prompt))


def _encoded_group(texts: list[str], tokenizer: Tokenizer) -> Iterator[_Encoded]:
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        yield _Encoded(ids, len(text.encode("utf-8", errors="replace")))


def _checked(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Ready-made tokens with an end token, if they can be of this tokenizer."""
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise DataError(
            f"the data hold token ids from {ids.min()} to {ids.max()}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size}: set data.tokenizer to the one they were made with"
        )
    return ids if ids[-1] == tokenizer.eos_id else np.append(ids, np.int32(tokenizer.eos_id))


def _write_shards(
    folder: Path, records: Iterator[_Encoded | Textless], tokenizer: Tokenizer, limit: int
) -> Iterator[dict]:
    """Writes shard after shard; yields the index entry of each."""
    dtype = token_dtype(tokenizer.vocab_size)
    number, total, reported = 0, 0, time.monotonic()
    record = next(records, None)
    while record is not None:
        path = folder / f"tokens-{number:05d}.bin"
        bounds, text_bytes, max_id, content = [0], 0, 0, hashlib.sha256()
        prompts: list[int] = []
        empty, keyless = 0, 0
        keys: tuple[str, ...] = ()
        with path.open("wb") as file:
            while record is not None and (bounds[-1] < limit or isinstance(record, Textless)):
                if not isinstance(record, Textless):
                    raw = record.tokens.astype(dtype).tobytes()
                    file.write(raw)
                    content.update(raw)
                    bounds.append(bounds[-1] + len(record.tokens))
                    prompts.append(record.prompt)
                    text_bytes += record.text_bytes
                    max_id = max(max_id, int(record.tokens.max()))
                elif record.keys is None:
                    empty += 1
                else:
                    keyless, keys = keyless + 1, keys or record.keys
                if time.monotonic() - reported > _REPORT_EVERY_S:
                    reported = time.monotonic()
                    log.info("tokenising: %s tokens so far", f"{total + bounds[-1]:,}")
                record = next(records, None)
        total += bounds[-1]
        np.save(folder / f"docs-{number:05d}.npy", np.array(bounds, np.int64))
        content.update(np.array(bounds, "<i8").tobytes())
        if any(prompts):
            np.save(folder / f"prompts-{number:05d}.npy", np.array(prompts, np.int64))
            content.update(np.array(prompts, "<i8").tobytes())
            sync(folder / f"prompts-{number:05d}.npy")
        sync(path)
        sync(folder / f"docs-{number:05d}.npy")
        yield {
            "tokens": bounds[-1],
            "documents": len(bounds) - 1,
            "bytes": text_bytes,
            "max_id": max_id,
            "sha256": content.hexdigest(),
            "empty": empty,
            "keyless": keyless,
            "keys": keys,  # of the first record that lacks the one asked for
            **({"prompts": sum(prompts)} if any(prompts) else {}),
        }
        number += 1


def file_identity(path: Path) -> dict:
    """What a cached store remembers of a source file: a change of any of it makes another store.

    The time of the last change of the file (ctime) tells content that was replaced under the same size and mtime.
    """
    stat = os.stat(path)
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }
