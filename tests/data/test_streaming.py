import dataclasses
import json
import socket
import time
import urllib.request

import numpy as np
import pytest

from adaptive.data import huggingface, streaming
from adaptive.data.batch import Group
from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.data.huggingface import HubDocuments, HubError
from adaptive.data.pipeline import open_data
from adaptive.data.shards import Shard
from adaptive.data.streaming import Packer, StreamedData
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError

SEQ = 12
HELD_OUT = 10


class Listed:
    """A stream of known documents, in groups of 7."""

    def __init__(self, texts, name="listed"):
        self.name = name
        self.texts = texts

    def groups(self, position):
        for first in range(position["at"] if position else 0, len(self.texts), 7):
            yield Group({"at": first}, first, self.texts[first : first + 7])


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{seed}:{i}" + "." * int(rng.integers(0, 40)) for i in range(count)]


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(streaming, "HELD_OUT_DOCUMENTS", HELD_OUT)


CONFIG = DataConfig(source="huggingface", paths=("a", "b"), weights=(0.75, 0.25), seq_len=SEQ, prefetch=3)


def make(shard=(0, 1), config=CONFIG, batch_size=4, counts=(40, 31)) -> StreamedData:
    streams = [Listed(make_texts(count, seed), f"s{seed}") for seed, count in enumerate(counts)]
    return StreamedData(config, load_tokenizer("bytes"), streams, Shard(*shard, batch_size))


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    state = json.loads(json.dumps(batches.state()))
    batches.close()
    return taken, state


def test_windows_are_the_documents_end_to_end():
    tokenizer = load_tokenizer("bytes")
    texts = make_texts(40)
    packer = Packer(Listed(texts), tokenizer, SEQ, held_out=HELD_OUT)
    flat = np.concatenate(tokenizer.encode_documents(texts[HELD_OUT:] * 2))
    for w in range((len(flat) - 1) // SEQ):
        tokens, openings = packer.next()
        np.testing.assert_array_equal(tokens, flat[w * SEQ : (w + 1) * SEQ + 1])
        starts = np.flatnonzero(tokens[:-1] == 256) + 1
        np.testing.assert_array_equal(openings, [0, *starts])


@pytest.mark.parametrize("seed", [None, 5])
def test_a_packer_continues_from_any_state(seed):
    def make_packer(state=None):
        return Packer(Listed(make_texts(25)), load_tokenizer("bytes"), SEQ, held_out=3, seed=seed, state=state)

    packer, states, windows = make_packer(), [], []
    for _ in range(120):  # several epochs
        states.append(json.loads(json.dumps(packer.state())))
        windows.append(packer.next())
    for start in range(0, 110, 7):
        resumed = make_packer(states[start])
        assert resumed.state() == states[start]
        for window in windows[start : start + 8]:
            for a, b in zip(window, resumed.next(), strict=True):
                np.testing.assert_array_equal(a, b)


def test_groups_are_shuffled_anew_in_each_epoch():
    texts = [f"{i:02}" for i in range(21)]
    packer = Packer(Listed(texts), load_tokenizer("bytes"), 3, held_out=0, seed=1)  # a document is 3 tokens
    epochs = [[tuple(packer.next()[0][:3]) for _ in range(21)] for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 21


def rows(batches) -> list[tuple]:
    return [tuple(row) for batch in batches for row in batch.tokens]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_and_resume(processes):
    straight = make()
    expected, _ = take(straight.train(), 9)
    first, state = take(make().train(), 3)
    parts = [take(make((p, processes)).train(state), 6) for p in range(processes)]
    assert all(part_state == parts[0][1] for _, part_state in parts)
    resumed = [
        tuple(parts[p][0][k].tokens[r]) for k in range(6) for r in range(4 // processes) for p in range(processes)
    ]
    assert rows(first) + resumed == rows(expected)
    assert parts[0][1]["next_index"] == 9 * 4


def test_state_of_the_batch_returned():
    train = make().train()
    assert train.next_index == 0
    next(train)
    assert train.next_index == 4
    train.close()


def test_streams_are_mixed_by_weight():
    batches, state = take(make().train(), 20)
    assert state["drawn"] == [60, 20]
    assert all(batch.segment_ids.min() == 1 for batch in batches)


def test_cross_document_rows_are_one_segment():
    batches, _ = take(make(config=dataclasses.replace(CONFIG, cross_document=True)).train(), 5)
    assert all((batch.segment_ids == 1).all() and batch.mask.all() for batch in batches)


def test_held_out_documents_are_never_trained_on():
    config = dataclasses.replace(CONFIG, weights=(), shuffle=False)
    data = make(config=config, counts=(40,))
    held = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in data.validation()])
    tokenizer = data.tokenizer
    assert tokenizer.decode(held) == "".join(make_texts(40)[:HELD_OUT])
    batches, _ = take(data.train(), 60)
    trained = tokenizer.decode(np.concatenate([batch.tokens.reshape(-1) for batch in batches]))
    epoch = "".join(make_texts(40)[HELD_OUT:])
    assert len(trained) > 2 * len(epoch) and (epoch * 10).startswith(trained)


def test_validation_is_complete_and_the_same_each_time():
    data = make()
    held = list(data.validation())
    assert rows(held) == rows(data.validation())
    expected = sum(len(text) for seed in (0, 1) for text in make_texts(HELD_OUT, seed))
    assert sum(batch.mask.sum() for batch in held) == expected
    few = list(data.validation(held[0].tokens.shape[0] + 1))
    assert rows(few[:1]) == rows(held[:1]) and (few[1].tokens[0] == held[1].tokens[0]).all()
    assert len(few) == 2 and not few[1].mask[1:].any()
    assert data.tokenizer.decode(data.validation_passage(3)) == "0:0"


def test_validation_over_processes():
    whole = rows(make().validation())
    parts = [rows(make((p, 2)).validation()) for p in range(2)]
    assert sorted(whole) == sorted(parts[0] + parts[1]) and len(parts[0]) == len(parts[1])


def test_stream_without_text_to_train_on():
    train = make(counts=(HELD_OUT, HELD_OUT)).train()
    with pytest.raises(DataError, match="nothing to train on"):
        next(train)
    train.close()


def test_position_in_another_stream_is_refused():
    _, state = take(make().train(), 1)
    with pytest.raises(DataError, match="other data"):
        make(config=dataclasses.replace(CONFIG, seq_len=8)).train(state)


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route")


def test_unreachable_hub_stops_at_once(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    config = DataConfig(**{**DATA_PRESETS["fineweb_edu"], "tokenizer": "bytes"})
    with pytest.raises(HubError, match=r"the data set HuggingFaceTB/smollm-corpus.*cannot be reached \(no route\)"):
        open_data(config, batch_size=8, vocab_size=320)
    with pytest.raises(HubError, match=r"the tokenizer some/name .*needs the Hugging Face hub"):
        load_tokenizer("some/name")


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(huggingface, "_REACH_WITHIN_S", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    begin = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached"):
        huggingface.require_hub("this")
    assert time.monotonic() - begin < 10  # a hang, not slowness, is what this looks for
    listener.close()


def test_offline_mode_is_respected(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        huggingface.require_hub("this")


def test_hub_documents_resume(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = make_texts(100)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    local = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    monkeypatch.setattr(huggingface, "require_hub", lambda purpose: None)
    monkeypatch.setattr(huggingface, "_load", lambda repo: local)
    monkeypatch.setattr(huggingface, "_GROUP", 16)
    stream = HubDocuments("some/name", "text")
    groups = list(stream.groups(None))
    assert [text for group in groups for text in group.texts] == texts
    for k in range(len(groups)):
        resumed = list(stream.groups(json.loads(json.dumps(groups[k].position))))
        assert [g.texts for g in resumed] == [g.texts for g in groups[k:]]
        assert [g.first for g in resumed] == [g.first for g in groups[k:]]
    with pytest.raises(DataError, match=r"no text in 'body' of its first 100 rows; its fields are text"):
        next(HubDocuments("some/name", "body").groups(None))


class Rows:
    """A data set of the hub, as far as it is used."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def state_dict(self):
        return {}


def test_hub_rows_without_text_are_left_out(monkeypatch, caplog):
    rows = [{"text": "one"}, {"text": None}, {"id": 1}, {"text": ""}, {"text": "two"}]
    monkeypatch.setattr(huggingface, "require_hub", lambda purpose: None)
    monkeypatch.setattr(huggingface, "_load", lambda repo: Rows(rows))
    caplog.set_level("INFO", "adaptive.data")
    (group,) = HubDocuments("some/name", "text").groups(None)
    assert group.texts == ["one", "", "", "", "two"]  # which no row is made of
    assert "3 of the first 5 rows have no text and are left out" in caplog.text
    packer = Packer(HubDocuments("some/name", "text"), load_tokenizer("bytes"), 3, held_out=0)
    assert [packer.next()[0].tolist() for _ in range(2)] == [[*b"one", 256], [256, *b"two"]]
    monkeypatch.setattr(huggingface, "_load", lambda repo: Rows([{"text": 7}]))
    with pytest.raises(DataError, match="has a int in 'text', expected text"):
        next(HubDocuments("some/name", "text").groups(None))


def test_a_tokenizer_of_the_hub_comes_with_its_configuration(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    there, cached = {"tokenizer.json", "tokenizer_config.json"}, set()

    def download(name, file, local_files_only=False, **options):
        if file not in (cached if local_files_only else there):
            raise FileNotFoundError(file)
        cached.add(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface, "require_hub", lambda purpose: None)
    both = (tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json")
    assert huggingface.hub_tokenizer("some/name") == both and cached == there
    assert huggingface.hub_tokenizer("some/name") == both
    there.remove("tokenizer_config.json")
    cached.clear()
    assert huggingface.hub_tokenizer("some/name") == both and cached == there
    there.clear()
    cached.clear()
    with pytest.raises(HubError, match="cannot be had"):
        huggingface.hub_tokenizer("some/name")
