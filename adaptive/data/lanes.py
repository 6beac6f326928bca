"""Documents of a stream that are dealt to lanes, so that a process encodes those of its own lanes alone.

Every process reads the stream. The next document goes to the lane that has had the least text: that needs no tokens, so
all agree, and lanes stay about equally far. What is dealt to the lanes of others is dropped as it was read.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from adaptive.data.batch import DocumentStream, Group
from adaptive.data.packing import Packer
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError

_AT_ONCE = 64  # documents encoded together


def wanted(group: Group, held_out: int, *, only_held_out: bool = False) -> list[int]:
    """Which documents of a group have text and are to be trained on, or are held out: the first so many of a stream."""
    return [
        i for i, text in enumerate(group.texts) if text and (group.first + i < held_out) == only_held_out
    ]  # fmt: skip


class Lanes:
    """Endless windows of each lane of `mine`, of the `lanes` lanes that the documents of a stream are dealt to.

    held_out  so many documents at the beginning of the stream are left out
    seed      shuffles the documents of a group; None: in order
    state     where to go on, of the same number of lanes and at least those of `mine`
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        lanes: int,
        mine: Sequence[int],
        held_out: int,
        seed: int | None,
        state: dict | None = None,
    ):
        self._stream, self._tokenizer = stream, tokenizer
        self._held_out, self._seed = held_out, seed
        if state is None:
            start = {"group": 0, "epoch": 0, "position": None, "loads": [0] * lanes, "dealt": [0] * lanes}
            state = {"anchor": start, "lanes": {str(lane): [0, 0] for lane in mine}}
        anchor, at = state["anchor"], {lane: state["lanes"][str(lane)] for lane in mine}
        self._anchors = deque([anchor])  # places in the stream to go on from, and what was dealt before
        self._loads, self._dealt = list(anchor["loads"]), list(anchor["dealt"])
        self._heap = [(load, lane) for lane, load in enumerate(self._loads)]
        heapq.heapify(self._heap)
        self._passed = {lane: taken - anchor["dealt"][lane] for lane, (taken, _) in at.items()}  # not wanted again
        self._pending: deque[tuple[int, str]] = deque()  # dealt to `mine` and not yet encoded
        self._encoded: dict[int, deque[np.ndarray]] = {lane: deque() for lane in mine}
        self._packers = {
            lane: Packer(self._documents(lane), seq_len, taken, offset) for lane, (taken, offset) in at.items()
        }
        self._dealing = self._deal(anchor)

    def next(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """The next window of a lane, as a Packer gives it."""
        return self._packers[lane].next()

    def state(self) -> dict:
        """JSON from which equal lanes go on with their next windows.

        anchor  a place in the stream, the text that each lane had had there, and the documents
        lanes   of each of `mine`, the documents it is done with, and the first token wanted of the next
        """
        at = {lane: (packer.taken, packer.offset) for lane, packer in self._packers.items()}
        while len(self._anchors) > 1 and all(
            self._anchors[1]["dealt"][lane] <= taken for lane, (taken, _) in at.items()
        ):
            self._anchors.popleft()
        return {"anchor": self._anchors[0], "lanes": {str(lane): list(place) for lane, place in at.items()}}

    def _documents(self, lane: int) -> Iterator[np.ndarray]:
        encoded = self._encoded[lane]
        while True:
            while not encoded:
                if not self._pending:
                    next(self._dealing)
                self._encode([self._pending.popleft() for _ in range(min(len(self._pending), _AT_ONCE))])
            yield encoded.popleft()

    def _deal(self, anchor: dict) -> Iterator[None]:
        """Reads and deals a group at a time, over and over."""
        number, epoch, position = anchor["group"], anchor["epoch"], anchor["position"]
        while True:
            nothing = position is None
            for group in self._stream.groups(position):
                if number > anchor["group"]:
                    here = {"group": number, "epoch": epoch, "position": group.position}
                    self._anchors.append(here | {"loads": list(self._loads), "dealt": list(self._dealt)})
                texts = self._ordered(group, epoch)
                self._pending.extend(self._dealt_to_mine(texts))
                nothing &= not texts
                number += 1
                yield
            if nothing:
                raise DataError(
                    f"{self._stream.name} leaves nothing to train on: its first {self._held_out} documents are held "
                    "out. Save it as files (data.source=files), or set data.validation_every=0"
                )
            position, epoch = None, epoch + 1

    def _ordered(self, group: Group, epoch: int) -> list[str]:
        chosen = wanted(group, self._held_out)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch, group.first]).permutation(len(chosen))
            chosen = [chosen[i] for i in order]
        return [group.texts[i] for i in chosen]

    def _dealt_to_mine(self, texts: list[str]) -> Iterator[tuple[int, str]]:
        """(lane, text) of the documents that windows of `mine` still need."""
        for text in texts:
            load, lane = self._heap[0]
            load += len(text) + 1
            heapq.heapreplace(self._heap, (load, lane))
            self._loads[lane] = load
            self._dealt[lane] += 1
            if lane not in self._passed:
                continue
            if self._passed[lane]:
                self._passed[lane] -= 1
            else:
                yield lane, text

    def _encode(self, mine: list[tuple[int, str]]) -> None:
        for (lane, _), tokens in zip(mine, self._tokenizer.encode_documents([text for _, text in mine]), strict=True):
            self._encoded[lane].append(tokens)
