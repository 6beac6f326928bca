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


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("document", RecipeError, "has no document"),
        ("nothing", DataError, "is no function, but int"),
        ("numbers", DataError, "document 0 is of type int, expected text"),
        ("broken", RecipeError, "line 8: ValueError: the disk is gone"),
    ],
)
def test_what_gives_no_documents_is_told(name, error, says):
    with pytest.raises(error, match=says):
        opened(name).validation_passage(100)
