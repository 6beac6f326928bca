"""Batches for training and evaluation: shuffled, mixed, sharded over processes, resumable from one number."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from adaptive.data.config import DataConfig
from adaptive.data.files import digest
from adaptive.data.prepare import cached_store, source_files
from adaptive.data.store import TokenStore
from adaptive.data.tokenizers import Tokenizer, load_tokenizer
from adaptive.data.windows import Batch, Split, Windows, padding_row, stack
from adaptive.errors import DataError

_READ_THREADS = 2
_SHOWN_TOKENS = 20


class TrainBatches(Protocol):
    """An endless iterator of this process's rows of each global batch."""

    next_index: int  # sequences of the global batches returned so far, over all processes and runs

    def __iter__(self) -> "TrainBatches": ...

    def __next__(self) -> Batch: ...

    def state(self) -> dict:
        """JSON that `Data.train` continues from, just after the last batch returned; equal on every process."""

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

    def validation(self, batches: int = 0) -> Iterator[Batch]:
        """This process's rows of `batches` held-out batches (0: all), the same at each call.

        Rows that fill up the last batch have segment 0 and mask 0.
        """

    def validation_passage(self, length: int) -> np.ndarray:
        """i32[up to length]: the first tokens held out."""

    def describe(self) -> list[str]:
        """Lines that tell the user what will be read."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One entry of `data.paths` with its two splits."""

    name: str
    store: TokenStore
    train: Windows
    validation: Windows
    train_split: Split
    validation_split: Split
    seed: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows a process takes: those whose global index is `index` modulo `count`."""

    index: int
    count: int
    batch_size: int  # global

    @property
    def rows(self) -> int:
        return self.batch_size // self.count


class IndexedTrainBatches:
    """TrainBatches over a random-access data set; its state is the number of sequences consumed."""

    def __init__(self, rows: grain.MapDataset, shard: Shard, start: int, prefetch: int, fingerprint: str):
        mine = rows[start + shard.index :: shard.count].batch(shard.rows, drop_remainder=True, batch_fn=stack)
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=max(prefetch, 1))
        self._batches = iter(mine.to_iter_dataset(options))
        self._batch_size = shard.batch_size
        self._fingerprint = fingerprint
        self.next_index = start

    def __iter__(self) -> "IndexedTrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.next_index += self._batch_size
        return batch

    def state(self) -> dict:
        return {"next_index": self.next_index, "fingerprint": self._fingerprint}

    def close(self) -> None:
        self._batches.close()


class StoredData:
    """Data from token stores: every row is a function of its index."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, corpora: list[Corpus], shard: Shard):
        self.tokenizer = tokenizer
        self._config = config
        self._corpora = corpora
        self._shard = shard
        sizes = [float(len(corpus.train)) for corpus in corpora]
        self._weights = list(config.weights) or [size / sum(sizes) for size in sizes]
        self.fingerprint = digest(
            {
                "tokens": [corpus.store.fingerprint for corpus in corpora],
                "weights": self._weights,
                "seq_len": config.seq_len,
                "shuffle_seed": config.shuffle_seed if config.shuffle else None,
                "validation_every": config.validation_every,
            }
        )

    def train(self, state: dict | None = None) -> IndexedTrainBatches:
        start = resume_index(state, self.fingerprint)
        return IndexedTrainBatches(self._rows(), self._shard, start, self._config.prefetch, self.fingerprint)

    def _rows(self) -> grain.MapDataset:
        parts = []
        for corpus in self._corpora:
            rows = grain.MapDataset.source(corpus.train).seed(corpus.seed)
            parts.append((rows.shuffle() if self._config.shuffle else rows).repeat())
        return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=self._weights)

    def validation(self, batches: int = 0) -> Iterator[Batch]:
        held_out = [corpus.validation for corpus in self._corpora]
        total = sum(len(windows) for windows in held_out)
        count = min(batches * self._shard.batch_size, total) if batches else total
        ends = np.cumsum([len(windows) for windows in held_out])

        def row(i: int) -> Batch:
            if i >= count:
                return padding_row(self._config.seq_len, self.tokenizer.eos_id)
            # Evenly spaced over all corpora, so that a few batches speak for the whole.
            at = i * total // count
            corpus = int(np.searchsorted(ends, at, side="right"))
            return held_out[corpus][at - (int(ends[corpus - 1]) if corpus else 0)]

        for first in range(0, count, self._shard.batch_size):
            mine = range(first + self._shard.index, first + self._shard.batch_size, self._shard.count)
            yield stack([row(i) for i in mine])

    def validation_passage(self, length: int) -> np.ndarray:
        for corpus in self._corpora:
            if len(corpus.validation_split):
                return corpus.validation_split.read(0, min(length, len(corpus.validation_split)))
        return np.zeros(0, np.int32)

    def describe(self) -> list[str]:
        lines = []
        lengths = self.tokenizer.token_byte_lengths()
        for corpus, weight in zip(self._corpora, self._weights, strict=True):
            split, held = corpus.train_split, corpus.validation_split
            opening = split.read(0, min(_SHOWN_TOKENS, len(split)))
            lines.append(
                f"{corpus.name}: {len(split.documents) - 1:,} documents, {len(split):,} tokens, "
                f"{len(corpus.train):,} rows of {self._config.seq_len} to train on; "
                f"{len(held):,} tokens held out ({held.rule}); {weight / sum(self._weights):.0%} of the rows"
            )
            lines.append(f"{corpus.name} begins: {self.tokenizer.decode(opening)!r} ({lengths[opening].sum()} bytes)")
        return lines


def resume_index(state: dict | None, fingerprint: str) -> int:
    """Where to continue. Raises DataError when `state` is of data with another fingerprint."""
    if state is None:
        return 0
    if state["fingerprint"] != fingerprint:
        raise DataError(
            "the saved position is in other data: its fingerprint is "
            f"{state['fingerprint'][:12]}, the recipe's is {fingerprint[:12]}. A corpus, the tokenizer, data.seq_len, "
            "data.weights, data.shuffle_seed or data.validation_every changed; restore them or start a new workdir"
        )
    return int(state["next_index"])


def open_data(config: DataConfig, *, batch_size: int, vocab_size: int, shard: tuple[int, int] = (0, 1)) -> Data:
    """What `config` names, ready to read; text is tokenised into the cache first.

    batch_size  sequences per global batch
    vocab_size  of the model; the tokenizer's and every token must fit
    shard       (index, count) of this process among those that read different rows

    Raises DataError for anything missing, malformed, too small or ill-fitting.
    """
    index, count = shard
    if batch_size % count:
        raise DataError(f"a global batch of {batch_size} does not divide over {count} processes")
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size} or more, or choose another data.tokenizer"
        )
    _check(config)
    corpora = [_corpus(config, i, tokenizer, vocab_size) for i in range(len(config.paths))]
    rows = sum(len(corpus.train) for corpus in corpora)
    if rows < batch_size:
        raise DataError(
            f"{', '.join(config.paths)} gives {rows} rows of data.seq_len={config.seq_len} tokens, fewer than one "
            f"batch of {batch_size}: use more text, a smaller train.batch_size or a smaller data.seq_len"
        )
    return StoredData(config, tokenizer, corpora, Shard(index, count, batch_size))


def _check(config: DataConfig) -> None:
    if not config.paths:
        raise DataError("data.paths is empty: name at least one source")
    if config.weights and len(config.weights) != len(config.paths):
        raise DataError(f"data.weights has {len(config.weights)} numbers for {len(config.paths)} data.paths")
    if any(weight <= 0 for weight in config.weights):
        raise DataError(f"data.weights={config.weights}: every weight must be above 0")
    if config.seq_len < 1 or config.validation_every < 0 or config.validation_every == 1:
        raise DataError(
            f"data.seq_len={config.seq_len} must be 1 or more; data.validation_every={config.validation_every} must be "
            "0 (hold nothing out) or 2 or more"
        )


def _corpus(config: DataConfig, i: int, tokenizer: Tokenizer, vocab_size: int) -> Corpus:
    path = config.paths[i]
    files = source_files(config.source, path, config.cache_dir)
    store = cached_store(files, tokenizer, text_key=config.text_key, cache=config.cache_dir)
    if store.max_id >= vocab_size:
        raise DataError(f"{path} holds token id {store.max_id}, the model's vocabulary ends at {vocab_size - 1}")
    train, held_out = (Split(store, which, config.validation_every) for which in ("train", "validation"))
    shape = {"cross_document": config.cross_document, "filler": tokenizer.eos_id}
    windows = Windows(train, config.seq_len, partial=False, **shape)
    if not len(windows):
        raise DataError(
            f"{path} has {len(train):,} tokens to train on, one row of data.seq_len={config.seq_len} needs "
            f"{config.seq_len + 1}: use more text or a smaller data.seq_len"
        )
    return Corpus(
        name=path,
        store=store,
        train=windows,
        validation=Windows(held_out, config.seq_len, partial=True, **shape),
        train_split=train,
        validation_split=held_out,
        seed=config.shuffle_seed + i,
    )
