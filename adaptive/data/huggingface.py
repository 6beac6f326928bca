"""The Hugging Face hub: data sets as streams of documents, and tokenizers. Reached only for names that ask for it."""

import contextlib
import copy
import itertools
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptive.data.batch import Group
from adaptive.data.tokenizer_files import CONFIG
from adaptive.errors import DataError

_REACH_WITHIN_S = 4.0
_GROUP = 1024  # documents fetched, shuffled and tokenised at once
_MOST_PARTS = 8  # each keeps a file open, and a group of its rows

log = logging.getLogger("adaptive.data")


class HubError(DataError):
    """The hub cannot be reached, or does not have what was named. The same recipe can run on local data."""


def require_hub(purpose: str) -> None:
    """Returns if the hub answers within four seconds, else raises HubError saying what it was needed for."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise HubError(f"{purpose} needs the Hugging Face hub, but HF_HUB_OFFLINE is set")
    outcome: list[str] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_REACH_WITHIN_S).close()
            outcome.append("")
        except urllib.error.HTTPError as answer:  # any answer below 500 shows that it is there
            outcome.append("" if answer.code < 500 else f"it answers {answer.code}")
        except Exception as error:
            outcome.append(str(getattr(error, "reason", error)))

    # Looking up a name has no time limit of its own, hence the thread.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_REACH_WITHIN_S)
    problem = outcome[0] if outcome else f"no answer within {_REACH_WITHIN_S:.0f} s"
    if problem:
        raise HubError(f"{purpose} needs the Hugging Face hub, but {endpoint} cannot be reached ({problem})")


def hub_tokenizer(name: str) -> tuple[Path, Path]:
    """Paths of the `tokenizer.json` of a hub repository and of its `tokenizer_config.json`, which may not exist.

    They are downloaded if they are not in the hub's own cache.
    """
    purpose = f"the tokenizer {name} (no such file here; data.tokenizer also takes a path, bytes or bpe-4096)"
    try:
        import huggingface_hub
    except ImportError:
        require_hub(purpose)
        raise HubError(f"the tokenizer {name} is on the Hugging Face hub: pip install 'adaptive-lm[hf]'") from None

    def cached(file: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=True))
        except Exception:  # not in the cache: several kinds of error, by version
            return None

    def fetched(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, etag_timeout=_REACH_WITHIN_S))

    path, config = cached("tokenizer.json"), cached(CONFIG)
    if path is None:
        require_hub(purpose)
        try:
            path = fetched("tokenizer.json")
        except Exception as error:
            raise HubError(f"the tokenizer {name} cannot be had from the Hugging Face hub: {error}") from None
    if config is None:
        with contextlib.suppress(Exception):  # most have one; what is used instead is told to the user
            require_hub(purpose)
            config = fetched(CONFIG)
    return path, config or path.with_name(CONFIG)


class HubDocuments:
    """Documents of a hub data set, streamed in groups; see `batch.DocumentStream`.

    repo      "owner/name" or "owner/name:config"; its split `train` is read
    text_key  the field with the text
    """

    def __init__(self, repo: str, text_key: str):
        self.name = repo
        self._text_key = text_key
        require_hub(f"the data set {repo}")
        self._dataset = _load(repo)

    def parts(self) -> list["HubDocuments"]:
        """Its files by as many readers as they allow, a power of two and at most eight; each has neighbouring files."""
        files = getattr(self._dataset, "num_shards", 1)
        count = 1 << (min(files, _MOST_PARTS).bit_length() - 1)
        if count == 1:
            return [self]
        found = [copy.copy(self) for _ in range(count)]
        for index, part in enumerate(found):
            part._dataset = self._dataset.shard(num_shards=count, index=index)
        return found

    def groups(self, position: dict | None) -> Iterator[Group]:
        position = position or {"documents": 0, "dataset": None}
        dataset = copy.deepcopy(self._dataset)  # its state is its own: training and held-out text are read at once
        if position["dataset"] is not None:
            dataset.load_state_dict(position["dataset"])
        rows = iter(dataset)
        while group := list(itertools.islice(rows, _GROUP)):
            seen = position["documents"]
            texts = [self._text(row) for row in group]
            if not seen:
                self._check_first(group, texts)
            yield Group(position, seen, texts)
            position = {"documents": seen + len(texts), "dataset": dataset.state_dict()}

    def _text(self, row: dict) -> str:
        """The text of a row; empty for one that has none."""
        value = row.get(self._text_key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"the data set {self.name} has a {type(value).__name__} in '{self._text_key}', expected text; its "
                f"fields are {', '.join(row)} (set data.text_key)"
            )
        return value

    def _check_first(self, rows: list[dict], texts: list[str]) -> None:
        """Says how many of the first rows have no text; DataError where none has any."""
        empty = texts.count("")
        if empty == len(rows):
            fields = ", ".join(dict.fromkeys(field for row in rows for field in row))
            raise DataError(
                f"the data set {self.name} has no text in '{self._text_key}' of its first {len(rows):,} rows; its "
                f"fields are {fields} (set data.text_key)"
            )
        if empty:
            log.info("%s: %s of the first %s rows have no text and are left out", self.name, empty, len(rows))


def _load(repo: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise HubError(f"the data set {repo} is on the Hugging Face hub: pip install 'adaptive-lm[hf]'") from None
    name, _, config = repo.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split="train", streaming=True)
    except Exception as error:
        raise HubError(f"the data set {repo} cannot be had from the Hugging Face hub: {error}") from None
