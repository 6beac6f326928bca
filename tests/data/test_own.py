"""Documents that a function of the user's gives, up to batches, and resumed."""

import json
import sys

import numpy as np
import pytest

from adaptive.data import own, streaming
from adaptive.data.config import DataConfig
from adaptive.data.pipeline import open_data
from adaptive.errors import DataError, RecipeError

CORPUS = """
def documents():
    for i in range(60):
        yield f"document {i}"

ASKED = []

def apart(part, parts):
    ASKED.append(part)
    for i in range(part, 160, parts):
        yield f"document {i}"

def broken():
    yield "one"
    raise ValueError("the disk is gone")

def numbers():
    return [1, 2]

nothing = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(streaming, "HELD_OUT_DOCUMENTS", 10)
    monkeypatch.setattr(own, "_GROUP", 7)
    (tmp_path / "corpus_of_mine.py").write_text(CORPUS)
    yield
    sys.modules.pop("corpus_of_mine", None)


def opened(name: str):
    return open_data(
        DataConfig(source="own", paths=(f"corpus_of_mine:{name}",), seq_len=8), batch_size=2, vocab_size=320
    )


def test_its_documents_become_rows_and_the_position_is_kept():
    data = opened("documents")
    held_out = data.tokenizer.decode(data.validation_passage(1000))
    assert "document 9" in held_out and "document 10" not in held_out
    batches = data.train()
    rows = [next(batches).tokens for _ in range(12)]
    state = json.loads(json.dumps(batches.state()))
    after = [next(batches).tokens for _ in range(40)]  # into the second epoch
    batches.close()
    assert "document 9" not in data.tokenizer.decode(np.concatenate(rows).ravel())
    again = opened("documents").train(state)
    assert all((next(again).tokens == row).all() for row in after)
    again.close()


def test_a_process_asks_for_its_parts_alone():
    config = DataConfig(source="own", paths=("corpus_of_mine:apart",), seq_len=8, validation_every=0)
    found = []
    for shard in ((0, 1), (0, 2), (1, 2)):
        batches = open_data(config, batch_size=8, vocab_size=320, shard=shard).train()
        asked = sys.modules["corpus_of_mine"].ASKED
        asked.clear()
        found.append([next(batches).tokens for _ in range(3)])
        batches.close()
        assert set(asked) == set(range(shard[0], 8, shard[1]))
    for whole, even, odd in zip(*found, strict=True):
        assert (whole[::2] == even).all() and (whole[1::2] == odd).all()
    data = open_data(DataConfig(source="own", paths=("corpus_of_mine:apart",), seq_len=8), batch_size=2, vocab_size=320)
    assert data.tokenizer.decode(data.validation_passage(1000)).count("document") == 8  # of 10, one of each part


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("document", RecipeError, "has no document"),
        ("nothing", DataError, "is no function, but int"),
        ("numbers", DataError, "document 0 is of type int, expected text"),
        ("broken", RecipeError, "line 15: ValueError: the disk is gone"),
    ],
)
def test_what_gives_no_documents_is_told(name, error, says):
    with pytest.raises(error, match=says):
        opened(name).validation_passage(100)
