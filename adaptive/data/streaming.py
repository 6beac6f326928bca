"""Training rows from documents that arrive in order and cannot be looked up: tokenised, joined and cut on the way.

Every process reads the same documents and makes the same rows, and keeps those of its own index. So global batches and
the saved position do not depend on the number of processes; the price is that each process tokenises everything.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from adaptive.data.batch import Batch, DocumentStream, Group, make_row, padding_row, stack
from adaptive.data.config import DataConfig
from adaptive.data.files import digest
from adaptive.data.shards import Shard, check_fingerprint
from adaptive.data.tokenizers import Tokenizer
from adaptive.data.words import row_marker
from adaptive.errors import DataError

HELD_OUT_DOCUMENTS = 4096  # the first documents of a stream; later ones would take long to reach at each start


class Packer:
    """Endless windows of seq_len + 1 tokens of one stream, each sharing one token with the next.

    Documents of a group are shuffled by `seed` (None: kept in order). The held-out documents are the first
    `held_out` of the stream: `held_out_only` gives those, once; otherwise the others, over and over.
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        held_out: int,
        held_out_only: bool = False,
        seed: int | None = None,
        state: dict | None = None,
    ):
        self._stream = stream
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._held_out = held_out
        self._held_out_only = held_out_only
        self._seed = seed
        self._start = state or {"epoch": 0, "position": None, "document": 0, "offset": 0}
        self._epoch = self._start["epoch"]
        self._offset = self._start["offset"]  # first token wanted, of the first piece held
        self._pieces: deque[tuple[dict, np.ndarray]] = deque()  # where a document is, and its tokens
        self._held = 0
        self._source = self._documents(self._start["position"], self._start["document"])

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """i32[seq_len + 1] tokens and i64[segments] where each document or rest of one begins among them.

        The last window of held-out documents may be shorter; after it, StopIteration.
        """
        while self._held - self._offset < self._seq_len + 1:
            piece = next(self._source, None)
            if piece is None:
                break
            self._pieces.append(piece)
            self._held += len(piece[1])
        if self._held - self._offset < 2:
            raise StopIteration
        parts, openings, length = [], [], 0
        for _, document in self._pieces:
            if length == self._seq_len + 1:
                break
            openings.append(length)
            parts.append(document[0 if length else self._offset :][: self._seq_len + 1 - length])
            length += len(parts[-1])
        self._advance()
        return np.concatenate(parts), np.array(openings)

    def state(self) -> dict:
        """JSON from which an equal Packer continues with the next window."""
        return {**self._pieces[0][0], "offset": self._offset} if self._pieces else self._start

    def _advance(self) -> None:
        self._offset += self._seq_len
        while self._pieces and self._offset >= len(self._pieces[0][1]):
            dropped = len(self._pieces.popleft()[1])
            self._offset -= dropped
            self._held -= dropped

    def _documents(self, position: dict | None, skip: int) -> Iterator[tuple[dict, np.ndarray]]:
        while True:
            empty = position is None
            for group in self._stream.groups(position):
                chosen = self._order(group)
                encoded = self._tokenizer.encode_documents([group.texts[i] for i in chosen[skip:]])
                for number, tokens in enumerate(encoded, skip):
                    empty = False
                    yield {"epoch": self._epoch, "position": group.position, "document": number}, tokens
                skip = 0
                if self._held_out_only and group.first + len(group.texts) >= self._held_out:
                    return
            if self._held_out_only:
                return
            if empty:
                raise DataError(
                    f"{self._stream.name} leaves nothing to train on: its first {self._held_out} documents are held "
                    "out. Save it as files (data.source=files), or set data.validation_every=0"
                )
            position, self._epoch = None, self._epoch + 1

    def _order(self, group: Group) -> list[int]:
        """Which documents of the group are wanted, in the order wanted."""
        indices = np.arange(len(group.texts))
        held_out = group.first + indices < self._held_out
        wanted = [int(i) for i in indices[held_out == self._held_out_only] if group.texts[i]]
        if self._seed is None:
            return wanted
        order = np.random.default_rng([self._seed, self._epoch, group.first]).permutation(len(wanted))
        return [wanted[i] for i in order]


class StreamedData:
    """Data of streams, mixed by `config.weights` (equal where there are none); see `pipeline.Data`.

    The first HELD_OUT_DOCUMENTS of each stream are held out, none if config.validation_every is 0.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, streams: Sequence[DocumentStream], shard: Shard):
        self.tokenizer = tokenizer
        self._config = config
        self._streams = streams
        self._shard = shard
        self._mark = row_marker(config.boundaries, tokenizer)
        self._held_out = HELD_OUT_DOCUMENTS if config.validation_every else 0
        self._held_rows: list[Batch] = []  # fetched once, as reaching them again means streaming again
        self._held_source = self._held_out_rows()
        self.fingerprint = digest(
            {
                "streams": [stream.name for stream in streams],
                "text_key": config.text_key,
                "tokenizer": tokenizer.fingerprint,
                "weights": list(config.weights),
                "seq_len": config.seq_len,
                "shuffle_seed": config.shuffle_seed if config.shuffle else None,
                "held_out": self._held_out,
                **({} if config.boundaries == "none" else {"boundaries": config.boundaries}),
            }
        )

    def train(self, state: dict | None = None) -> "StreamedTrainBatches":
        check_fingerprint(state, self.fingerprint)
        return StreamedTrainBatches(self, state)

    def packers(self, states: list[dict] | None) -> list[Packer]:
        """One packer of training windows for each stream, from saved states."""
        return [
            self._packer(stream, held_out_only=False, state=states[i] if states else None)
            for i, stream in enumerate(self._streams)
        ]

    def row(self, tokens: np.ndarray, openings: np.ndarray) -> Batch:
        """The window as a row."""
        openings = openings[:1] if self._config.cross_document else openings
        return self._mark(make_row(tokens, openings, self._config.seq_len, self.tokenizer.eos_id))

    def validation(self, rows: int = 0) -> Iterator[Batch]:
        size = self._shard.batch_size
        filler = self._mark(padding_row(self._config.seq_len, self.tokenizer.eos_id))
        for first in itertools.count(0, size):
            some = self._first_held_out(min(first + size, rows or first + size))[first:]
            if not some:
                return
            some += [filler] * (size - len(some))
            yield stack(some[self._shard.index :: self._shard.count])

    def validation_passage(self, length: int) -> np.ndarray:
        rows = self._first_held_out(-(-length // self._config.seq_len))
        tokens = [row.tokens[row.segment_ids > 0] for row in rows]
        return np.concatenate([np.zeros(0, np.int32), *tokens])[:length]

    def describe(self) -> list[str]:
        names = ", ".join(stream.name for stream in self._streams)
        held_out = f"the first {self._held_out:,} documents of each held out" if self._held_out else "nothing held out"
        return [
            f"{names}: streamed in rows of {self._config.seq_len}; {held_out}",
            self.tokenizer.describe_borders(),
        ]

    def _packer(self, stream: DocumentStream, *, held_out_only: bool, state: dict | None = None) -> Packer:
        seed = self._config.shuffle_seed if self._config.shuffle and not held_out_only else None
        return Packer(
            stream,
            self.tokenizer,
            self._config.seq_len,
            held_out=self._held_out,
            held_out_only=held_out_only,
            seed=seed,
            state=state,
        )

    def _held_out_rows(self) -> Iterator[Batch]:
        """Held-out rows, taking turns between the streams until each has ended."""
        packers = [self._packer(stream, held_out_only=True) for stream in self._streams if self._held_out]
        while packers:
            for packer in list(packers):
                try:
                    window = packer.next()
                except StopIteration:
                    packers.remove(packer)
                else:
                    yield self.row(*window)

    def _first_held_out(self, count: int) -> list[Batch]:
        while len(self._held_rows) < count and (row := next(self._held_source, None)) is not None:
            self._held_rows.append(row)
        return self._held_rows[:count]

    @property
    def shard(self) -> Shard:
        return self._shard

    @property
    def weights(self) -> tuple[float, ...]:
        """Proportion of rows from each stream."""
        return self._config.weights or (1.0,) * len(self._streams)

    @property
    def prefetch(self) -> int:
        return max(self._config.prefetch, 1)


class _Rows:
    """Global batches made one after the other, of which this process's rows are returned (a grain iterator)."""

    def __init__(self, data: StreamedData, state: dict | None):
        self._data = data
        self.set_state(state or {"next_index": 0, "drawn": [0] * len(data.weights), "streams": None})

    def __iter__(self) -> "_Rows":
        return self

    def __next__(self) -> Batch:
        shard = self._data.shard
        mine = []
        for i in range(shard.batch_size):
            window = self._packers[self._turn()].next()
            if i % shard.count == shard.index:
                mine.append(self._data.row(*window))
        self._next_index += shard.batch_size
        return stack(mine)

    def _turn(self) -> int:
        """The stream that is furthest behind its weight gives the next row."""
        due = [(drawn + 1) / weight for drawn, weight in zip(self._drawn, self._data.weights, strict=True)]
        stream = due.index(min(due))
        self._drawn[stream] += 1
        return stream

    def get_state(self) -> dict:
        streams = [packer.state() for packer in self._packers]
        return {"next_index": self._next_index, "drawn": list(self._drawn), "streams": streams}

    def set_state(self, state: dict) -> None:
        self._next_index = state["next_index"]
        self._drawn = list(state["drawn"])
        self._packers = self._data.packers(state["streams"])


class StreamedTrainBatches:
    """See `pipeline.TrainBatches`; a thread makes the batches ahead."""

    def __init__(self, data: StreamedData, state: dict | None):
        self._batches = grain.experimental.ThreadPrefetchDatasetIterator(_Rows(data, state), data.prefetch)
        self._fingerprint = data.fingerprint

    @property
    def next_index(self) -> int:
        return self._batches.get_state()["next_index"]

    def __iter__(self) -> "StreamedTrainBatches":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> dict:
        return {**self._batches.get_state(), "fingerprint": self._fingerprint}

    def close(self) -> None:
        self._batches.close()
