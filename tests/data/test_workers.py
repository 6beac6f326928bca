"""Batches that other processes make are those that this one would have made."""

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest

from adaptive.data.config import DataConfig
from adaptive.data.pipeline import open_data
from adaptive.errors import DataError, UserError

MODULE = """
def documents():
    for i in range(300):
        yield f"{i} " + "some text " * (i % 7)

def broken():
    yield from documents()
    raise ValueError("no more text")
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    (tmp_path / "texts_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield DataConfig(source="own", paths=("texts_of_mine:documents",), seq_len=16, validation_every=0)
    sys.modules.pop("texts_of_mine", None)


def taken(config, count, state=None, shard=(0, 1)):
    """(batches, position behind them)"""
    train = open_data(config, batch_size=4, vocab_size=320, shard=shard).train(state)
    try:
        assert train.next_index == (state["next_index"] if state else 0)
        assert train.state()["next_index"] == train.next_index
        batches = [next(train) for _ in range(count)]
        return batches, json.loads(json.dumps(train.state()))
    finally:
        train.close()


def equal(some, others):
    for batch, other in zip(some, others, strict=True):
        for field, same in zip(batch[:5], other[:5], strict=True):
            np.testing.assert_array_equal(field, same)
    return True


def test_workers_make_the_same_batches_and_positions(config):
    by_two = dataclasses.replace(config, workers=2)
    alone, behind = taken(config, 9)
    together, state = taken(by_two, 9)
    assert equal(together, alone) and state == behind
    resumed, _ = taken(by_two, 4, taken(config, 5)[1])
    assert equal(resumed, alone[5:])
    last, _ = taken(dataclasses.replace(config, workers=1), 3, state, shard=(1, 2))
    assert equal(last, taken(config, 3, behind, shard=(1, 2))[0])


def test_rows_of_stores_are_made_alike(tmp_path):
    (tmp_path / "a.txt").write_text("Some words of a text. " * 40)
    stored = DataConfig(source="files", paths=(str(tmp_path / "a.txt"),), seq_len=16, cache_dir=str(tmp_path))
    alone, behind = taken(stored, 5)
    together, state = taken(dataclasses.replace(stored, workers=2), 5)
    assert equal(together, alone) and state == behind


def test_what_a_worker_meets_is_told_as_it_would_be_without(config):
    broken = dataclasses.replace(config, paths=("texts_of_mine:broken",))
    with pytest.raises(UserError, match="no more text") as alone:
        taken(broken, 1000)
    with pytest.raises(UserError, match="texts_of_mine:broken") as told:
        taken(dataclasses.replace(broken, workers=1), 1000)
    assert str(told.value) == str(alone.value) and told.type is alone.type


def test_a_worker_that_is_lost_is_told(config):
    train = open_data(dataclasses.replace(config, workers=1, prefetch=1), batch_size=4, vocab_size=320).train()
    next(train)
    (worker,) = train._workers
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the run to answer
        os.kill(worker._process.pid, number)
    for _ in range(3):
        next(train)
    worker._process.kill()
    with pytest.raises(DataError, match=r"worker 0 of data\.workers ended by signal 9 \(out of memory\?\)"):
        for _ in range(100_000):
            next(train)
    train.close()


def test_rows_that_do_not_divide_over_workers(config):
    with pytest.raises(DataError, match=r"data\.workers=3: each process reads 2 rows of a batch.* 1, 2 would do"):
        open_data(dataclasses.replace(config, workers=3), batch_size=4, vocab_size=320, shard=(0, 2))
