"""Training rows from documents that arrive in order and cannot be looked up: tokenised, joined and cut on the way.

Row i belongs to lane i modulo the number of lanes, and each lane makes its rows of the documents that are dealt to it
(`lanes`). There are as many lanes as rows in the first batch, so that those of a process are its own: it encodes its
share of the text, and global batches do not depend on how many processes there are. A position is the number of rows,
with where each lane is in its documents; every process knows of its own lanes, and `whole_position` puts them together.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from adaptive.data.ahead import Ahead
from adaptive.data.batch import Batch, DocumentStream, make_row, make_rows, padding_row, stack
from adaptive.data.config import DataConfig
from adaptive.data.files import digest
from adaptive.data.lanes import Lanes, wanted
from adaptive.data.packing import Packer
from adaptive.data.shards import Shard, check_fingerprint
from adaptive.data.tokenizers import Tokenizer
from adaptive.data.words import batch_marker, row_marker
from adaptive.errors import DataError

HELD_OUT_DOCUMENTS = 4096  # the first documents of a stream; later ones would take long to reach at each start
_ORDER = 2  # of rows; a position in another one means other text


class StreamedData:
    """Data of streams, mixed by `config.weights` (equal where there are none); see `pipeline.Data`.

    The first HELD_OUT_DOCUMENTS of each stream are held out (of a stream in parts, the first of each part, all together
    as many), none if config.validation_every is 0.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, streams: Sequence[DocumentStream], shard: Shard):
        self.tokenizer = tokenizer
        self._config = config
        self._streams = streams
        self._shard = shard
        self._mark, self._mark_all = (
            row_marker(config.boundaries, tokenizer),
            batch_marker(config.boundaries, tokenizer),
        )
        self.parts = [stream.parts() for stream in streams]
        self._held_out = HELD_OUT_DOCUMENTS if config.validation_every else 0
        self._held_rows: list[Batch] = []  # fetched once, as reaching them again means streaming again
        self._held_source = self._held_out_rows()
        self.fingerprint = digest(
            {
                "streams": [stream.name for stream in streams],
                "parts": [len(parts) for parts in self.parts],
                "order": _ORDER,
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
        if state is not None and state.get("order") != _ORDER:
            raise DataError(
                "the saved position is of an earlier version of adaptive, which had rows of streamed text in another "
                "order: finish the run with that version, or go on from its weights in a new workdir (init.run)"
            )
        check_fingerprint(state, self.fingerprint)
        return StreamedTrainBatches(self, state)

    def lanes(self, stream: int, part: int, lanes: int, mine: Sequence[int], state: dict | None) -> Lanes:
        """Those of a part of a stream, from a saved state."""
        return Lanes(
            self.parts[stream][part],
            self.tokenizer,
            self._config.seq_len,
            lanes=lanes,
            mine=mine,
            held_out=self._held_out // len(self.parts[stream]),
            seed=self._config.shuffle_seed if self._config.shuffle else None,
            state=state,
        )

    def batch(self, windows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Full windows as a batch."""
        rows = np.repeat(np.arange(len(windows)), [len(openings) for _, openings in windows])
        openings = np.concatenate([openings for _, openings in windows])
        if self._config.cross_document:
            rows, openings = rows[:0], openings[:0]
        tokens = np.stack([tokens for tokens, _ in windows])
        return self._mark_all(make_rows(tokens, np.full(len(tokens), tokens.shape[1]), rows, openings))

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

    def _held_out_documents(self, stream: DocumentStream, count: int) -> Iterator[np.ndarray]:
        for group in stream.groups(None):
            yield from self.tokenizer.encode_documents(
                [group.texts[i] for i in wanted(group, count, only_held_out=True)]
            )
            if group.first + len(group.texts) >= count:
                return

    def _held_out_rows(self) -> Iterator[Batch]:
        """Held-out rows, taking turns between the streams and their parts until each has ended."""
        packers = [
            Packer(self._held_out_documents(part, self._held_out // len(parts)), self._config.seq_len)
            for parts in self.parts
            for part in parts
            if self._held_out
        ]
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
    """Batches of this process's rows, one after the other, from a position on."""

    def __init__(self, data: StreamedData, state: dict | None):
        shard = data.shard
        self._data = data
        self._next_index = state["next_index"] if state else 0
        self._lanes = state["lanes"] if state else math.lcm(shard.batch_size, *map(len, data.parts))
        # Rows of this process are in these lanes alone: where `step` is less than the number of processes, because that
        # does not divide the lanes, others encode them as well.
        self._step = math.gcd(self._lanes, shard.count)
        mine = range(shard.index % self._step, self._lanes, self._step)
        self._drawn = {lane: list(state["drawn"][str(lane)]) for lane in mine} if state else self._staggered(mine)
        self._streams = [self._parts(stream, mine, state) for stream in range(len(data.parts))]

    def __iter__(self) -> Iterator[tuple[Batch, dict]]:
        """Each batch, and the position behind it."""
        shard = self._data.shard
        while True:
            first, self._next_index = self._next_index, self._next_index + shard.batch_size
            behind = (shard.index - first) % self._step
            rows = [(i, self._window(i % self._lanes)) for i in range(first + behind, self._next_index, self._step)]
            mine = [window for i, window in rows if i % shard.count == shard.index]
            yield self._data.batch(mine), self.state()

    def state(self) -> dict:
        return {
            "order": _ORDER,
            "next_index": self._next_index,
            "fingerprint": self._data.fingerprint,
            "lanes": self._lanes,
            "drawn": {str(lane): list(drawn) for lane, drawn in self._drawn.items()},
            "streams": [[part and part.state() for part in parts] for parts in self._streams],
        }

    def _parts(self, stream: int, mine: Sequence[int], state: dict | None) -> list[Lanes | None]:
        """Lane l reads part l modulo their number; None where this process has no lane of a part."""
        count, found = len(self._data.parts[stream]), []
        for part in range(count):
            inner = [lane // count for lane in mine if lane % count == part]
            saved = state["streams"][stream][part] if state else None
            found.append(self._data.lanes(stream, part, self._lanes // count, inner, saved) if inner else None)
        return found

    def _window(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        parts = self._streams[_turn(self._drawn[lane], self._data.weights)]
        part = parts[lane % len(parts)]
        assert part is not None
        return part.next(lane // len(parts))

    def _staggered(self, mine: Sequence[int]) -> dict[int, list[int]]:
        """Rows that each lane counts as drawn from each stream at the beginning: lane l is l turns ahead, so that the
        rows of a batch are mixed by weight."""
        drawn, found = [0] * len(self._data.weights), {}
        for lane in range(self._lanes):
            if lane in mine:
                found[lane] = list(drawn)
            _turn(drawn, self._data.weights)
        return found


def _turn(drawn: list[int], weights: Sequence[float]) -> int:
    """The stream that is furthest behind its weight gives the next row, which is counted."""
    due = [(rows + 1) / weight for rows, weight in zip(drawn, weights, strict=True)]
    stream = due.index(min(due))
    drawn[stream] += 1
    return stream


def whole_position(parts: Sequence[dict]) -> dict:
    """The position of a job from what its processes have, in the order of their rows (`TrainBatches.state`)."""
    first = parts[0]
    if "streams" not in first:  # an index says it all
        return first
    streams = [
        [_joined([part for part in some if part]) if any(some) else None for some in zip(*stream, strict=True)]
        for stream in zip(*(part["streams"] for part in parts), strict=True)
    ]
    drawn = {lane: rows for part in parts for lane, rows in part["drawn"].items()}
    return first | {"drawn": drawn, "streams": streams}


def _joined(parts: Sequence[dict]) -> dict:
    """The lanes of all, from the place in the stream that is behind them all."""
    anchor = min((part["anchor"] for part in parts), key=lambda anchor: anchor["group"])
    return {"anchor": anchor, "lanes": {lane: place for part in parts for lane, place in part["lanes"].items()}}


class StreamedTrainBatches:
    """See `pipeline.TrainBatches`; a thread makes the batches ahead."""

    def __init__(self, data: StreamedData, state: dict | None):
        rows = _Rows(data, state)
        self._state = rows.state()
        self._ahead = Ahead(iter(rows), data.prefetch)

    @property
    def next_index(self) -> int:
        index: int = self._state["next_index"]
        return index

    @property
    def ready(self) -> int:
        """Batches that are made and not taken."""
        return self._ahead.ready

    def __iter__(self) -> "StreamedTrainBatches":
        return self

    def __next__(self) -> Batch:
        batch, self._state = next(self._ahead)
        return batch

    def state(self) -> dict:
        return self._state

    def close(self) -> None:
        self._ahead.close()
