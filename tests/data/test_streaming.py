import dataclasses
import json
import re
import socket
import time
import urllib.request

import numpy as np
import pytest

from adaptive.data import huggingface, streaming
from adaptive.data.batch import Group
from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.data.huggingface import HubDocuments, HubError
from adaptive.data.lanes import Lanes
from adaptive.data.pipeline import open_data
from adaptive.data.shards import Shard
from adaptive.data.streaming import StreamedData, whole_position
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

    def parts(self):
        return [self]


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


def lanes(count=1, mine=None, texts=(), seed=None, held_out=0, seq_len=SEQ, state=None):
    mine = range(count) if mine is None else mine
    tokenizer = load_tokenizer("bytes")
    options = {"lanes": count, "mine": mine, "held_out": held_out, "seed": seed, "state": state}
    return Lanes(Listed(list(texts)), tokenizer, seq_len, **options)


def test_windows_are_the_documents_end_to_end():
    texts = make_texts(40)
    only = lanes(texts=texts, held_out=HELD_OUT)
    flat = np.concatenate(load_tokenizer("bytes").encode_documents(texts[HELD_OUT:] * 2))
    for w in range((len(flat) - 1) // SEQ):
        tokens, openings = only.next(0)
        np.testing.assert_array_equal(tokens, flat[w * SEQ : (w + 1) * SEQ + 1])
        starts = np.flatnonzero(tokens[:-1] == 256) + 1
        np.testing.assert_array_equal(openings, [0, *starts])


@pytest.mark.parametrize("seed", [None, 5])
def test_lanes_continue_from_any_state(seed):
    texts = make_texts(25)
    some, states, windows = lanes(3, texts=texts, seed=seed, held_out=3), [], []
    for i in range(120):  # several epochs
        states.append(json.loads(json.dumps(some.state())))
        windows.append(some.next(i % 3))
    for start in range(0, 110, 7):
        resumed = lanes(3, texts=texts, seed=seed, held_out=3, state=states[start])
        assert resumed.state() == states[start]
        for i in range(start, start + 8):
            for a, b in zip(windows[i], resumed.next(i % 3), strict=True):
                np.testing.assert_array_equal(a, b)


def test_groups_are_shuffled_anew_in_each_epoch():
    some = lanes(texts=[f"{i:02}" for i in range(21)], seed=1, seq_len=3)  # a document is 3 tokens
    epochs = [[tuple(some.next(0)[0][:3]) for _ in range(21)] for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 21


def test_each_document_goes_to_one_lane_and_lanes_have_equally_much():
    texts = make_texts(400)
    some = lanes(4, texts=texts)
    found = []
    for lane in range(4):
        tokens = [some.next(lane)[0][:-1] for _ in range(120)]
        found.append(load_tokenizer("bytes").decode(np.concatenate(tokens)))
    sizes = some.state()["anchor"]["loads"]
    assert max(sizes) - min(sizes) <= max(map(len, texts)) + 1
    heads = [text.split(":")[1].rstrip(".") for text in texts]
    seen = [head for text in found for head in re.findall(r"0:(\d+)(?=\.*0:)", text)]
    assert len(seen) > 200 and len(set(seen)) == len(seen) and set(seen) <= set(heads)


def test_a_lane_that_lags_goes_on_where_it_is():
    texts = make_texts(60)
    ahead = lanes(2, texts=texts)
    expected = [ahead.next(1)[0].tolist() for _ in range(20)]
    late = lanes(2, texts=texts)
    for _ in range(30):
        late.next(0)
    late = lanes(2, texts=texts, state=json.loads(json.dumps(late.state())))
    assert [late.next(1)[0].tolist() for _ in range(20)] == expected


def test_more_lanes_than_documents_have_them_in_turns():
    some = lanes(5, texts=["ab", "cd"])
    assert {bytes(some.next(lane)[0][:2].tolist()) for lane in range(5)} == {b"ab", b"cd"}


def rows(batches) -> list[tuple]:
    return [tuple(row) for batch in batches for row in batch.tokens]


def of_job(processes, count, state=None, batch_size=4, **options):
    """(rows in their order, position) of a job of so many processes."""
    parts = [take(make((p, processes), batch_size=batch_size, **options).train(state), count) for p in range(processes)]
    mine = batch_size // processes
    found = [tuple(parts[p][0][k].tokens[r]) for k in range(count) for r in range(mine) for p in range(processes)]
    return found, json.loads(json.dumps(whole_position([state for _, state in parts])))


@pytest.mark.parametrize("path", [(4, 2, 1), (1, 4, 2), (2, 1, 4)])
def test_any_number_of_processes_reads_the_same_rows_once(path):
    expected, last = of_job(1, 15)
    found, state = [], None
    for processes in path:
        some, state = of_job(processes, 5, state)
        found += some
    assert found == expected and state["next_index"] == last["next_index"] == 15 * 4
    assert of_job(2, 3, state)[0] == of_job(1, 3, last)[0]


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_another_batch_size_and_processes_that_do_not_divide_it_go_on_with_the_same_rows(processes):
    expected, _ = of_job(1, 9)
    first, state = of_job(1, 3)
    second, _ = of_job(processes, 4, state, batch_size=6)
    assert first + second == expected


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self):
        self.tokenizer, self.seen = load_tokenizer("bytes"), []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_documents(self, texts):
        self.seen += texts
        return self.tokenizer.encode_documents(texts)


def test_a_process_encodes_its_share_alone():
    shares = []
    for shard in ((0, 1), *((p, 4) for p in range(4))):
        tokenizer = Counting()
        streams = [Listed(make_texts(400, 0))]
        config = dataclasses.replace(CONFIG, paths=("a",), weights=())
        data = StreamedData(config, tokenizer, streams, Shard(*shard, 4))
        take(data.train(), 20)
        shares.append(set(tokenizer.seen))
    whole, *parts = shares
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert max(map(len, parts)) < 0.4 * len(whole)


class Halves(Listed):
    """A stream of two parts."""

    def parts(self):
        half = len(self.texts) // 2
        return [Listed(self.texts[:half], self.name), Listed(self.texts[half:], self.name)]


def test_parts_of_a_stream_are_read_apart(monkeypatch):
    read = []
    groups = Listed.groups
    monkeypatch.setattr(Listed, "groups", lambda self, at: read.append(self.texts[0]) or groups(self, at))
    texts = make_texts(80)

    def part(shard, state=None, batch_size=2):
        config = dataclasses.replace(CONFIG, paths=("a",), weights=())
        data = StreamedData(config, load_tokenizer("bytes"), [Halves(texts)], Shard(*shard, batch_size))
        return take(data.train(state), 6)

    batches, state = part((0, 1))
    first, second = part((0, 2)), part((1, 2))
    assert rows(batches) == [row for pair in zip(rows(first[0]), rows(second[0]), strict=True) for row in pair]
    assert whole_position([first[1], second[1]]) == state
    assert read == [texts[0], texts[40], texts[0], texts[40]]  # each process has read a part
    again, _ = part((1, 2), state)
    assert rows(again) == rows(part((0, 1), state)[0])[1::2]
    held = HELD_OUT // 2
    text = load_tokenizer("bytes").decode(np.concatenate([batch.tokens.reshape(-1) for batch in batches]))
    assert not any(f"{held_out}." in text for held_out in (*texts[:held], *texts[40 : 40 + held]))
    assert part((0, 1), batch_size=1)[0]  # one row a batch, two parts


def test_a_position_of_rows_in_another_order_is_refused():
    old = {"next_index": 8, "drawn": [6, 2], "streams": [], "fingerprint": make().fingerprint}
    with pytest.raises(
        DataError, match="earlier version of adaptive, which had rows of streamed text in another order"
    ):
        make().train(old)


def test_state_of_the_batch_returned():
    train = make().train()
    assert train.next_index == 0
    next(train)
    assert train.next_index == 4
    train.close()


def test_streams_are_mixed_by_weight():
    batches, state = take(make().train(), 20)
    drawn = np.array(list(state["drawn"].values())) - [[0, 0], [1, 0], [2, 0], [3, 0]]  # lanes begin staggered
    assert drawn.sum(0).tolist() == [60, 20]
    assert all(batch.segment_ids.min() == 1 for batch in batches)


def test_cross_document_rows_are_one_segment():
    batches, _ = take(make(config=dataclasses.replace(CONFIG, cross_document=True)).train(), 5)
    assert all((batch.segment_ids == 1).all() and batch.mask.all() for batch in batches)


def test_held_out_documents_are_never_trained_on():
    config = dataclasses.replace(CONFIG, weights=(), shuffle=False)
    data = make(config=config, counts=(40,), batch_size=1)  # one lane has the documents in order
    held = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in data.validation()])
    tokenizer = data.tokenizer
    assert tokenizer.decode(held) == "".join(make_texts(40)[:HELD_OUT])
    batches, _ = take(data.train(), 240)
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
    stream = HubDocuments("some/name", "text")
    some = Lanes(stream, load_tokenizer("bytes"), 3, lanes=1, mine=[0], held_out=0, seed=None)
    assert [some.next(0)[0].tolist() for _ in range(2)] == [[*b"one", 256], [256, *b"two"]]
    monkeypatch.setattr(huggingface, "_load", lambda repo: Rows([{"text": 7}]))
    with pytest.raises(DataError, match="has a int in 'text', expected text"):
        next(HubDocuments("some/name", "text").groups(None))


class Files(Rows):
    """A data set of the hub in several files, each a list of rows."""

    def __init__(self, files):
        super().__init__([row for file in files for row in file])
        self.files, self.num_shards = files, len(files)

    def shard(self, num_shards, index):
        return Files(np.array_split(self.files, num_shards)[index].tolist())


@pytest.mark.parametrize(("files", "parts"), [(1, 1), (3, 2), (7, 4), (40, 8)])
def test_files_of_a_hub_data_set_are_read_in_parts(files, parts, monkeypatch):
    rows = [[{"text": f"{i}:{j}"} for j in range(3)] for i in range(files)]
    monkeypatch.setattr(huggingface, "require_hub", lambda purpose: None)
    monkeypatch.setattr(huggingface, "_load", lambda repo: Files(rows))
    found = HubDocuments("some/name", "text").parts()
    texts = [[text for group in part.groups(None) for text in group.texts] for part in found]
    assert len(found) == parts and all(texts)
    assert [text for part in texts for text in part] == [row["text"] for file in rows for row in file]


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
