"""Processes of this machine that make the batches (`data.workers`).

Of W workers each takes every W-th row of its process, as if it were one of W times as many processes. So rows and
positions are the same whatever W is. They are plain interpreters, started anew: nothing is forked, and none of them
reaches for a device.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np

from adaptive.data.ahead import Ahead
from adaptive.data.batch import Batch
from adaptive.data.config import DataConfig
from adaptive.data.shards import Shard
from adaptive.data.streaming import whole_position
from adaptive.errors import DataError

_THREADS = ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")
_ONE = ("false", "1", "1")  # a worker is one thread of work; more of them is the user's to choose


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is told.

    path  where Python finds modules: a source of the user's may be in one
    """

    config: DataConfig
    vocab_size: int
    shard: Shard
    state: dict
    path: list[str]


def check_workers(workers: int, shard: Shard) -> None:
    """Raises DataError where the rows of a process do not divide over its workers."""
    if workers and shard.rows % workers:
        fitting = [str(count) for count in range(1, min(shard.rows, 64) + 1) if shard.rows % count == 0]
        raise DataError(
            f"data.workers={workers}: each process reads {shard.rows} rows of a batch, which do not divide over that "
            f"many workers: {', '.join(fitting)} would do, or 0 for none"
        )


class WorkerBatches:
    """See `pipeline.TrainBatches`; made by `config.workers` processes."""

    def __init__(self, config: DataConfig, vocab_size: int, shard: Shard, state: dict):
        count = config.workers
        alone = dataclasses.replace(config, workers=0)
        self._states = [state]
        self._workers: list[_Worker] = []
        self._ahead = Ahead(self._batches(), max(config.prefetch, 1))
        try:
            for number in range(count):
                own = Shard(shard.index + shard.count * number, shard.count * count, shard.batch_size)
                self._workers.append(_Worker(number, Job(alone, vocab_size, own, state, sys.path)))
        except BaseException:
            self.close()
            raise

    @property
    def next_index(self) -> int:
        index: int = self._states[0]["next_index"]
        return index

    @property
    def ready(self) -> int:
        """Batches that are made and not taken."""
        return self._ahead.ready

    def __iter__(self) -> "WorkerBatches":
        return self

    def __next__(self) -> Batch:
        batch, self._states = next(self._ahead)
        return batch

    def state(self) -> dict:
        return whole_position(self._states)

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._ahead.close()

    def _batches(self) -> Iterator[tuple[Batch, list[dict]]]:
        while True:
            parts = [worker.next() for worker in self._workers]
            yield _interleaved([batch for batch, _ in parts]), [state for _, state in parts]


def _interleaved(parts: list[Batch]) -> Batch:
    """Row r of the batch is of part r modulo their number."""
    fields: Any = (
        None if field[0] is None else np.stack(field, 1).reshape(-1, *field[0].shape[1:])
        for field in zip(*parts, strict=True)
    )
    return Batch(*fields)


class _Worker:
    """One of the processes, as its parent sees it. What it raises, `next` raises."""

    def __init__(self, number: int, job: Job):
        self._number = number
        self._batches, theirs = Pipe(duplex=False)
        environment = dict(zip(_THREADS, _ONE, strict=True)) | os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "adaptive.data.worker", str(theirs.fileno())]
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        # In a session of its own: what a terminal or a scheduler sends to the group is for the run to answer.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
        )
        theirs.close()
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(job))  # stays open: its end is that of the parent
        self._process.stdin.flush()

    def next(self) -> tuple[Batch, dict]:
        """The next batch of its rows, and the position behind it."""
        try:
            made, error = self._batches.recv()
        except (EOFError, OSError):
            raise DataError(self._lost()) from None
        if error is not None:
            raise error
        return made[0], made[1]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _lost(self) -> str:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        memory = " (out of memory?)" if code == -9 else ""
        return f"worker {self._number} of data.workers ended {how}{memory}; its last words, if any, are above"
