"""Prompts are read and not predicted: from rows of JSON to the targets that count."""

import json

import numpy as np
import pytest

from adaptive.data.config import DataConfig
from adaptive.data.pipeline import open_data
from adaptive.data.prepare import prepare
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError

SEQ = 16
PAIRS = [(f"question {i}? " * (i % 3), f"answer {i}.") for i in range(40)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    return path


def opened(path, tmp_path, **changes):
    given = {"source": "files", "text_key": "completion", "prompt_key": "prompt", "shuffle": False, "seq_len": SEQ}
    config = DataConfig(**given | {"paths": (str(path),), "cache_dir": str(tmp_path / "cache")} | changes)
    return open_data(config, batch_size=2, vocab_size=320)


def predicted(batches):
    """What the targets that count say, and all tokens that are read."""
    targets = np.concatenate([batch.targets[batch.mask > 0] for batch in batches])
    tokens = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    return targets, tokens


def test_completions_alone_are_predicted_and_prompts_are_read(file, tmp_path):
    data = opened(file, tmp_path)
    targets, tokens = predicted(list(data.validation()))
    end = data.tokenizer.eos_id
    held_out = [pair for i, pair in enumerate(PAIRS) if i % 20 == 19]
    # A document's first token has nothing before it, and is predicted in no case.
    want = [[*data.tokenizer.encode(text), end][int(not prompt) :] for prompt, text in held_out]
    assert len(want) == 2 and targets.tolist() == [token for ids in want for token in ids]
    assert data.tokenizer.decode(tokens).startswith("".join(held_out[0]))
    stream = data.train()
    batches = [next(stream) for _ in range(10)]
    stream.close()
    count = sum(int((batch.mask > 0).sum()) for batch in batches)
    assert 0 < count < sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert "of prompts, which are not predicted" in " ".join(data.describe())


def test_a_prepared_store_keeps_them(file, tmp_path):
    tokenizer = load_tokenizer("bytes")
    prepare([file], tokenizer, tmp_path / "store", text_key="completion", prompt_key="prompt")
    here = opened(tmp_path / "store", tmp_path, source="tokens", text_key="text", prompt_key="")
    there = opened(file, tmp_path)
    assert here.fingerprint == there.fingerprint
    for a, b in zip(here.validation(), there.validation(), strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
    without = opened(file, tmp_path, prompt_key="")
    assert without.fingerprint != there.fingerprint


def test_a_last_part_that_is_held_out_knows_its_prompts(tmp_path):
    """Where there are too few documents to hold one out, the cut is inside one."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p" * 60, "completion": "c" * 30}) + "\n" for _ in range(4)))
    data = opened(path, tmp_path, validation_every=8)
    targets, tokens = predicted(list(data.validation()))
    assert len(tokens) == 45 - 1 and set(targets.tolist()) <= {ord("c"), data.tokenizer.eos_id} and len(targets) == 31


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"completion": "x"}', r"a.jsonl:1: 'prompt' is nothing, expected the text of a prompt"),
        ("a.jsonl", '{"completion": "x", "prompt": 3}', "'prompt' is int"),
        ("a.txt", "text", r"a.txt: data.prompt_key=prompt needs rows of JSON"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        opened(tmp_path / name, tmp_path)
