"""Batches for training and evaluation: shuffled, mixed, sharded over processes, resumable from one number."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from adaptive.data.batch import Batch, joined, padding_row, stack
from adaptive.data.config import DataConfig
from adaptive.data.files import digest
from adaptive.data.foreign import open_tokens
from adaptive.data.huggingface import HubDocuments
from adaptive.data.order import Order
from adaptive.data.own import OwnDocuments
from adaptive.data.prepare import cached_store, source_files
from adaptive.data.shards import Shard, check_fingerprint
from adaptive.data.store import TokenStore
from adaptive.data.streaming import StreamedData
from adaptive.data.synthetic import SyntheticRows
from adaptive.data.tokenizers import Tokenizer, load_tokenizer
from adaptive.data.windows import Split, Windows
from adaptive.data.words import Marker, batch_marker
from adaptive.data.workers import WorkerBatches, check_workers
from adaptive.errors import DataError
from adaptive.printable import printable

_READ_THREADS = 2
_SHOWN_TOKENS = 20


class TrainBatches(Protocol):
    """An endless iterator of this process's rows of each global batch."""

    @property
    def next_index(self) -> int:
        """Sequences of the global batches returned so far, over all processes and runs."""

    def __iter__(self) -> "TrainBatches": ...

    def __next__(self) -> Batch: ...

    def state(self) -> dict:
        """JSON of where this process is, just after the last batch returned. `Data.train` continues from what
        `streaming.whole_position` makes of the states of all processes."""

    def close(self) -> None:
        """Stops the background threads."""


class Data(Protocol):
    """What a run reads. `fingerprint` (sha256, hex) changes whenever the sequence of training rows would."""

    tokenizer: Tokenizer
    fingerprint: str

    def train(self, state: dict | None = None) -> TrainBatches:
        """Batches from the beginning, or from a `state` of the same data on any number of processes.

        Raises DataError when the state is of other data.
        """

    def validation(self, rows: int = 0) -> Iterator[Batch]:
        """This process's share of `rows` held-out rows (0: all) in batches, the same rows at each call, for any batch
        size and any number of processes.

        Rows that fill up the last batch have segment 0 and mask 0.
        """

    def validation_passage(self, length: int) -> np.ndarray:
        """i32[up to length]: the first tokens held out."""

    def describe(self) -> list[str]:
        """Lines that tell the user what will be read."""


class RowSource(Protocol):
    """Rows (a Batch without the batch axis) by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def rows(self, indices: np.ndarray) -> Batch:
        """Those of i64[rows] as a batch."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of `data.paths`: the rows to train on and those held out.

    identity  changes whenever a row would
    about     lines for the user
    """

    name: str
    train: RowSource
    held_out: RowSource
    identity: str
    about: tuple[str, ...]


class _GlobalBatches:
    """This process's rows of every batch from sequence `start` on, by the number of the batch."""

    def __init__(self, order: Order, sources: Sequence[RowSource], mark: Marker, shard: Shard, start: int):
        self._order, self._sources, self._mark, self._shard, self._start = order, sources, mark, shard, start
        self.seconds = [0.0] * len(sources)  # that reading from each has taken

    def __len__(self) -> int:
        return sys.maxsize // self._shard.batch_size

    def __repr__(self) -> str:
        return f"batches from sequence {self._start} on"

    def __getitem__(self, number: int) -> Batch:
        first = self._start + number * self._shard.batch_size
        mine = range(first + self._shard.index, first + self._shard.batch_size, self._shard.count)
        source, row = self._order.rows(mine)
        at = [np.flatnonzero(source == number) for number in range(len(self._sources))]
        parts = [self._read(number, row[here]) for number, here in enumerate(at) if len(here)]
        return self._mark(joined(parts, [here for here in at if len(here)]))

    def _read(self, number: int, rows: np.ndarray) -> Batch:
        begin = time.perf_counter()
        read = self._sources[number].rows(rows)
        self.seconds[number] += time.perf_counter() - begin
        return read


class IndexedTrainBatches:
    """See TrainBatches; the state is the number of sequences consumed."""

    def __init__(self, batches: _GlobalBatches, shard: Shard, start: int, prefetch: int, fingerprint: str):
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=max(prefetch, 1))
        self._source = batches
        self._batches = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._batch_size = shard.batch_size
        self._fingerprint = fingerprint
        self._next_index = start

    @property
    def next_index(self) -> int:
        return self._next_index

    def __iter__(self) -> "IndexedTrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._next_index += self._batch_size
        return batch

    @property
    def seconds(self) -> list[float]:
        """That reading from each source has taken so far."""
        return list(self._source.seconds)

    def state(self) -> dict:
        return {"next_index": self._next_index, "fingerprint": self._fingerprint}

    def close(self) -> None:
        self._batches.close()


class IndexedData:
    """Data whose every row is a function of its index; see Data.

    Sources are mixed by `config.weights`, or by their number of rows. Each is shuffled as a whole, anew in each epoch.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: list[Source], shard: Shard):
        self.tokenizer = tokenizer
        self._config = config
        self.sources = sources
        self._shard = shard
        self._mark = batch_marker(config.boundaries, tokenizer)
        weights = config.weights or [float(len(source.train)) for source in sources]
        self._weights = [weight / sum(weights) for weight in weights]
        self.fingerprint = digest(
            {
                "sources": [source.identity for source in sources],
                "weights": self._weights,
                "seq_len": config.seq_len,
                "shuffle_seed": config.shuffle_seed if config.shuffle else None,
                "validation_every": config.validation_every,
                **({} if config.boundaries == "none" else {"boundaries": config.boundaries}),
            }
        )

    def train(self, state: dict | None = None) -> IndexedTrainBatches:
        check_fingerprint(state, self.fingerprint)
        start = state["next_index"] if state else 0
        sources = [source.train for source in self.sources]
        seed = self._config.shuffle_seed if self._config.shuffle else None
        order = Order([len(source) for source in sources], self._weights, seed)
        batches = _GlobalBatches(order, sources, self._mark, self._shard, start)
        return IndexedTrainBatches(batches, self._shard, start, self._config.prefetch, self.fingerprint)

    def validation(self, rows: int = 0) -> Iterator[Batch]:
        ends = np.cumsum([len(source.held_out) for source in self.sources])
        total = int(ends[-1])
        count = min(rows, total) if rows else total

        def row(i: int) -> Batch:
            if i >= count:
                return padding_row(self._config.seq_len, self.tokenizer.eos_id)
            # Evenly spaced over all sources, so that a few rows speak for the whole.
            at = i * total // count
            source = int(np.searchsorted(ends, at, side="right"))
            held_out = self.sources[source].held_out
            return held_out[at - int(ends[source]) + len(held_out)]

        for first in range(0, count, self._shard.batch_size):
            mine = range(first + self._shard.index, first + self._shard.batch_size, self._shard.count)
            yield self._mark(stack([row(i) for i in mine]))

    def validation_passage(self, length: int) -> np.ndarray:
        held_out = next((source.held_out for source in self.sources if len(source.held_out)), ())
        count = min(len(held_out), -(-length // self._config.seq_len))
        rows = [held_out[i] for i in range(count)]
        tokens = [row.tokens[row.segment_ids > 0] for row in rows]
        return np.concatenate([np.zeros(0, np.int32), *tokens])[:length]

    def describe(self) -> list[str]:
        lines = [line for source in self.sources for line in source.about]
        lines += [] if self._config.source == "synthetic" else [self.tokenizer.describe_borders()]
        if len(self.sources) == 1:
            return lines
        shares = ", ".join(f"{s.name} {w:.0%}" for s, w in zip(self.sources, self._weights, strict=True))
        return [*lines, f"rows are drawn from {shares}"]


class ByWorkers:
    """Data whose training rows are made by other processes; see Data."""

    def __init__(self, data: IndexedData | StreamedData, config: DataConfig, vocab_size: int, shard: Shard):
        self.tokenizer, self.fingerprint = data.tokenizer, data.fingerprint
        self.validation, self.validation_passage, self.describe = (
            data.validation, data.validation_passage, data.describe,
        )  # fmt: skip
        self._data, self._config, self._vocab_size, self._shard = data, config, vocab_size, shard

    def train(self, state: dict | None = None) -> WorkerBatches:
        batches = self._data.train(state)
        batches.close()
        return WorkerBatches(self._config, self._vocab_size, self._shard, batches.state())


def open_data(config: DataConfig, *, batch_size: int, vocab_size: int, shard: tuple[int, int] = (0, 1)) -> Data:
    """What `config` names, ready to read; text is tokenised into the cache first.

    batch_size  sequences per global batch
    vocab_size  of the model; the tokenizer's and every token must fit
    shard       (index, count) of this process among those that read different rows

    Raises DataError for anything missing, malformed, too small or ill-fitting; HubError, a DataError, where the
    Hugging Face hub is needed and cannot be reached.
    """
    rows = Shard(*shard, batch_size)
    _check(config)
    check_workers(config.workers, rows)
    tokenizer = load_tokenizer(config.tokenizer, bos=config.bos, eos=config.eos)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {vocab_size}: set "
            f"model.vocab_size={tokenizer.vocab_size} or more, or choose another data.tokenizer"
        )
    batch_marker(config.boundaries, tokenizer)  # a missing package is told before text is prepared
    if config.source == "huggingface":
        hub = [HubDocuments(path, config.text_key) for path in config.paths]
        return _made_by_workers(StreamedData(config, tokenizer, hub, rows), config, vocab_size, rows)
    if config.source == "own":
        own = [OwnDocuments(path) for path in config.paths]
        return _made_by_workers(StreamedData(config, tokenizer, own, rows), config, vocab_size, rows)
    if config.source == "synthetic":
        if config.boundaries != "none":
            raise DataError(f"data.boundaries={config.boundaries} needs text; synthetic tasks are none: set it to none")
        sources = [_synthetic_source(config, path, vocab_size) for path in config.paths]
    else:
        sources = [_stored_source(config, path, tokenizer) for path in config.paths]
    total = sum(len(source.train) for source in sources)
    if total < batch_size:
        raise DataError(
            f"{', '.join(config.paths)} gives {total} rows of data.seq_len={config.seq_len} tokens, fewer than one "
            f"batch of {batch_size}: use more text, a smaller train.batch_size or a smaller data.seq_len"
        )
    return _made_by_workers(IndexedData(config, tokenizer, sources, rows), config, vocab_size, rows)


def _made_by_workers(data: IndexedData | StreamedData, config: DataConfig, vocab_size: int, shard: Shard) -> Data:
    """The same data, whose training rows `config.workers` processes make, where there are any."""
    return ByWorkers(data, config, vocab_size, shard) if config.workers else data


def _check(config: DataConfig) -> None:
    if not config.paths:
        raise DataError("data.paths is empty: name at least one source")
    if config.weights and len(config.weights) != len(config.paths):
        raise DataError(f"data.weights has {len(config.weights)} numbers for {len(config.paths)} data.paths")
    if not all(weight > 0 for weight in config.weights):
        raise DataError(f"data.weights={config.weights}: every weight must be above 0")
    if config.seq_len < 1:
        raise DataError(f"data.seq_len={config.seq_len} must be 1 or more")
    if config.validation_every < 0 or config.validation_every == 1:
        raise DataError(f"data.validation_every={config.validation_every} must be 0 (hold nothing out) or 2 or more")


def store_of(config: DataConfig, path: str, tokenizer: Tokenizer) -> tuple[TokenStore, str]:
    """The documents of one of `config.paths`, of source embedded, files or tokens, and which files they are from; text
    is tokenised into the cache first. Raises DataError as `open_data` does."""
    if config.source == "tokens":
        return open_tokens(path, tokenizer, config.token_dtype, config.cache_dir), ""
    found = source_files(config.source, path, config.cache_dir)
    prompt_key = config.prompt_key if config.source == "files" else ""
    store = cached_store(
        found.files, tokenizer, text_key=config.text_key, prompt_key=prompt_key, cache=config.cache_dir
    )
    return store, printable(found.about())


def _stored_source(config: DataConfig, path: str, tokenizer: Tokenizer) -> Source:
    store, files_about = store_of(config, path, tokenizer)
    train, held_out = (Split(store, which, config.validation_every) for which in ("train", "validation"))
    windows = functools.partial(
        Windows, seq_len=config.seq_len, cross_document=config.cross_document, filler=tokenizer.eos_id
    )
    rows = windows(train, partial=False)
    if not len(rows):
        raise DataError(
            f"{path} has {len(train):,} tokens to train on, one row of data.seq_len={config.seq_len} needs "
            f"{config.seq_len + 1}: use more text or a smaller data.seq_len"
        )
    opening = tokenizer.decode(train.read(0, min(_SHOWN_TOKENS, len(train))))
    name = printable(path)
    return Source(
        name=path,
        train=rows,
        held_out=windows(held_out, partial=True),
        identity=store.fingerprint,
        about=(
            *([f"{name}: {files_about}"] if files_about else []),
            f"{name}: {_contents(store, config.text_key)} of {tokenizer.name}; "
            f"{len(rows):,} rows of {config.seq_len} to train on, {len(held_out):,} tokens held out ({train.rule})",
            f"{name} begins {opening!r}",
        ),
    )


def _contents(store: TokenStore, text_key: str) -> str:
    """What a store holds, and how many records had nothing for it."""
    size = "" if store.text_bytes is None else f"{store.text_bytes:,} bytes of text, "
    left_out = [f"{store.empty:,} empty"] if store.empty else []
    left_out += [f"{store.keyless:,} without '{printable(text_key)}'"] if store.keyless else []
    without = f" ({', '.join(left_out)} left out)" if left_out else ""
    prompts = "" if store.prompts is None else f" ({int(store.prompts.sum()):,} of prompts, which are not predicted)"
    return f"{len(store.documents) - 1:,} documents{without}, {size}{len(store):,} tokens{prompts}"


def _synthetic_source(config: DataConfig, name: str, vocab_size: int) -> Source:
    rows = functools.partial(
        SyntheticRows, name, seq_len=config.seq_len, vocab_size=vocab_size, seed=config.shuffle_seed
    )
    train, held_out = rows(held_out=False), rows(held_out=True)
    about = f"{name}: made from the row's index, {len(held_out)} rows held out"
    return Source(name, train, held_out, f"{name} of {vocab_size}, seed {config.shuffle_seed}", (about,))
