"""From what a recipe names to token stores: prepared ones, and text tokenised into the cache at first use."""

from pathlib import Path

from adaptive.data.corpus import CORPORA, embedded_corpus
from adaptive.data.files import cache_dir, digest
from adaptive.data.find import Found, find
from adaptive.data.sources import read_records
from adaptive.data.store import FORMAT, TokenStore, file_identity, open_store, write_store
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError

_READING = 2  # how files become documents; raised when the same files give others


def prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    text_key: str = "text",
    prompt_key: str = "",
) -> None:
    """Tokenises the documents of `files` into a new token store. Raises DataError if `directory` is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DataError(f"{directory} exists and is not empty; choose a new folder, or remove it first")
    _write(files, tokenizer, directory, text_key, prompt_key)


def cached_store(
    files: list[Path], tokenizer: Tokenizer, *, text_key: str = "text", prompt_key: str = "", cache: str = ""
) -> TokenStore:
    """The store of `files` in the cache folder, written if it is not there.

    Its name is a hash of the files (path, size, times of change), the tokenizer with the tokens that begin and end its
    documents, the options, and how this version reads files, so that a change of any of them never meets an old store.
    """
    options = [text_key, prompt_key] if prompt_key else [text_key]
    key = digest([FORMAT, _READING, [file_identity(file) for file in files], tokenizer.fingerprint, *options])
    directory = cache_dir(cache) / "tokens" / f"{files[0].stem}-{key[:16]}"
    if not (directory / "index.json").exists():
        _write(files, tokenizer, directory, text_key, prompt_key)
    return open_store(directory, tokenizer)


def _write(files: list[Path], tokenizer: Tokenizer, directory: Path, text_key: str, prompt_key: str) -> None:
    write_store(
        directory,
        read_records(files, text_key, prompt_key),
        tokenizer,
        sources=[file_identity(file) for file in files],
        options={"text_key": text_key} | ({"prompt_key": prompt_key} if prompt_key else {}),
    )


def source_files(source: str, path: str, cache: str = "") -> Found:
    """The files behind one entry of `data.paths` (source `embedded` or `files`). Raises DataError if there are none."""
    if source == "embedded":
        return Found([embedded_corpus(path, cache)], {})
    if path in CORPORA and not Path(path).exists():
        raise DataError(f"data.paths: no file {path}; for the embedded corpus of that name set data.source=embedded")
    return find(path, cache=cache)
