"""Evaluation sets: what to score, as rows in the layout of training, each target with its document."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from adaptive.data import fetch
from adaptive.data.batch import Batch
from adaptive.data.config import DataConfig
from adaptive.data.corpus import CORPORA
from adaptive.data.pipeline import open_data, store_of
from adaptive.data.tokenizers import Tokenizer
from adaptive.data.windows import Split, Windows
from adaptive.data.words import row_marker
from adaptive.errors import DataError
from adaptive.recipe import Recipe, name_from

OWN = "validation"  # the run's own held-out data
MEAN = "mean"  # over all sets
_STREAMED_BATCH = 8


class Row(NamedTuple):
    """batch: fields without the batch axis; documents i64[seq]: which one each target belongs to."""

    batch: Batch
    documents: np.ndarray


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """rows: every target of the set counts in exactly one; about: a line for the user."""

    name: str
    rows: Rows
    about: str

    def first(self, most: int) -> Iterator[Row]:
        """All rows, or so many evenly spaced over the set."""
        total = len(self.rows)
        count = min(most, total) if most else total
        return (self.rows[i * total // count] for i in range(count))


def open_sets(
    given: Sequence[str], recipe: Recipe, tokenizer: Tokenizer, *, stride: int = 0, option: str = "--data"
) -> list[EvaluationSet]:
    """The sets that `given` names, in rows as long as those that the model was trained on.

    given   of each: "validation", the run's own held-out data (each of its paths is a set); the name of a corpus that
            comes with the package, of which the held-out documents are taken; a file, folder, glob or token store, all
            of it; NAME=PATH says what it is called. Nothing: validation
    stride  tokens from one row to the next; 0: whole rows. See `adaptive.data.windows`
    option  how the user gave them; messages begin with it

    Raises DataError where one is missing, empty, malformed or of another tokenizer, or two have one name.
    """
    seq = recipe.data.seq_len
    if not 0 <= stride <= seq:
        raise DataError(f"stride {stride}: rows have data.seq_len={seq} tokens, so it is 1 to {seq}")
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {recipe.model.vocab_size}"
        )
    sets = [one for text in given or (OWN,) for one in _named(text, recipe, tokenizer, stride, option)]
    twice = [name for name, count in Counter(one.name for one in sets).items() if count > 1]
    if twice:
        raise DataError(f"two sets are called {twice[0]}: say NAME=PATH for one of them")
    for one in sets:
        if one.name == MEAN:
            raise DataError(f"a set cannot be called {MEAN}, which is the mean over sets: say NAME=PATH")
        if not len(one.rows):
            raise DataError(f"{one.name}: {one.about}: nothing to predict; a set has at least two tokens")
    return sets


def _named(text: str, recipe: Recipe, tokenizer: Tokenizer, stride: int, option: str) -> Iterator[EvaluationSet]:
    config = recipe.data
    name, equals, path = text.partition("=")
    if not equals or _is_there(text):
        name, path = "", text
    if path == OWN and not _is_there(path):
        yield from _own(recipe, tokenizer, stride)
        return
    if path in CORPORA and not _is_there(path):
        held_out = dataclasses.replace(config, source="embedded", validation_every=config.validation_every or 20)
        yield _stored(name or path, held_out, path, tokenizer, stride, "validation")
        return
    local = fetch.here(path, option, config.cache_dir)
    source = "tokens" if (local / "index.json").is_file() or local.suffix in (".bin", ".npy") else "files"
    if source == "files" and not local.exists() and not any(c in path for c in "*?["):
        raise DataError(
            f"{option} {text}: there is no such file or folder, and no set of that name: {OWN}, {', '.join(CORPORA)}"
        )
    whole = dataclasses.replace(config, source=source, validation_every=0)  # type: ignore[arg-type]
    yield _stored(name_from(name) if name else _name_of(path), whole, path, tokenizer, stride, "train")


def _name_of(path: str) -> str:
    """What a set is called by its path: its last part that has letters or digits, without what follows a dot."""
    parts = (part.split(".")[0] for part in reversed(Path(path).absolute().parts))
    return next((name_from(part) for part in parts if re.search(r"\w", part)), "set")


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # what no file can be called
        return False


def _own(recipe: Recipe, tokenizer: Tokenizer, stride: int) -> Iterator[EvaluationSet]:
    """The run's held-out data, a set for each of its paths."""
    config = recipe.data
    if config.source in ("embedded", "files", "tokens"):
        if not config.validation_every:
            raise DataError("data.validation_every=0: the run holds nothing out; name sets with --data")
        for path in config.paths:
            name = path if config.source == "embedded" else _name_of(path)
            yield _stored(name, config, path, tokenizer, stride, "validation")
        return
    if stride:
        raise DataError(f"--stride: the held-out rows of data.source={config.source} come as they are; leave it out")
    for path in config.paths:
        one = dataclasses.replace(config, paths=(path,), weights=())
        data = open_data(one, batch_size=_STREAMED_BATCH, vocab_size=recipe.model.vocab_size)
        yield EvaluationSet(name_from(path), _Listed(list(_listed(data.validation()))), f"held out of {path}")


def _stored(name: str, config: DataConfig, path: str, tokenizer: Tokenizer, stride: int, which: str) -> EvaluationSet:
    store, _ = store_of(config, path, tokenizer)
    split = Split(store, which, config.validation_every)  # type: ignore[arg-type]
    windows = Windows(
        split, config.seq_len, partial=True, cross_document=config.cross_document, filler=tokenizer.eos_id,
        stride=stride,
    )  # fmt: skip
    held_out = f", held out ({split.rule})" if which == "validation" else ""
    about = f"{len(split.documents) - 1:,} documents, {len(split):,} tokens of {tokenizer.name}{held_out}"
    return EvaluationSet(name, _Stored(windows, config, tokenizer), about)


class _Stored:
    """Windows of a store; see `Rows`."""

    def __init__(self, windows: Windows, config: DataConfig, tokenizer: Tokenizer):
        self._windows, self._mark = windows, row_marker(config.boundaries, tokenizer)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Row:
        return Row(self._mark(self._windows[index]), self._windows.documents(index))


class _Listed:
    """Rows that are at hand; see `Rows`."""

    def __init__(self, rows: list[Row]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


def _listed(batches: Iterator[Batch]) -> Iterator[Row]:
    """Rows of batches, without those that fill the last; of each, every segment is a document."""
    number = 0
    for batch in batches:
        for i in range(len(batch.tokens)):
            row = Batch(*(None if field is None else field[i] for field in batch))  # type: ignore[arg-type]
            if row.mask.any():
                yield Row(row, number + row.segment_ids.astype(np.int64))
                number += int(row.segment_ids.max()) + 1
