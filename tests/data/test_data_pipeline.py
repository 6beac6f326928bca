import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from adaptive.data.config import DATA_PRESETS, DataConfig
from adaptive.data.pipeline import open_data
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError

SEQ = 16


def write_corpus(path, documents: int, seed: int, length: int = 60) -> None:
    """Documents whose text names their number, so that a token tells where it came from."""
    rng = np.random.default_rng(seed)
    texts = [
        f"{path.stem} {i} " + "".join(rng.choice(list("abcdef"), rng.integers(1, length))) for i in range(documents)
    ]
    path.write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts))


def texts_of(path: str) -> list[str]:
    return Path(path).read_text().split("\n<|endoftext|>\n")[:-1]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two corpora of files, mixed unevenly."""
    paths = []
    for seed, name in enumerate(("first", "second")):
        write_corpus(tmp_path / f"{name}.txt", documents=60 - 20 * seed, seed=seed)
        paths.append(str(tmp_path / f"{name}.txt"))
    return DataConfig(
        source="files",
        paths=tuple(paths),
        weights=(0.7, 0.3),
        seq_len=SEQ,
        validation_every=5,
        cache_dir=str(tmp_path / "cache"),
    )


def load(config, batch_size=8, shard=(0, 1), vocab_size=320):
    return open_data(config, batch_size=batch_size, vocab_size=vocab_size, shard=shard)


def take(batches, count: int) -> list:
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def global_rows(config, processes: int, count: int, states=None) -> list[list[tuple]]:
    """The rows of each global batch, in the order of their global index."""
    local = [take(load(config, shard=(p, processes)).train(states), count) for p in range(processes)]
    batches = []
    for k in range(count):
        rows = [tuple(local[p][k].tokens[r]) for r in range(8 // processes) for p in range(processes)]
        batches.append(rows)
    return batches


def test_first_batch_and_its_types(config):
    batch = take(load(config).train(), 1)[0]
    assert all(field.shape == (8, SEQ) for field in batch[:5]) and batch.boundaries is None
    assert [field.dtype.name for field in batch[:5]] == ["int32", "int32", "int32", "int32", "float32"]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(config, processes):
    assert global_rows(config, processes, 12) == global_rows(config, 1, 12)


@pytest.mark.parametrize("path", [(1, 2, 1), (4, 1, 2), (2, 2, 4)])
def test_resume_on_other_process_counts_neither_loses_nor_repeats(config, path):
    straight = global_rows(config, 1, 15)
    resumed, state = [], None
    for processes in path:
        resumed += global_rows(config, processes, 5, state)
        train = load(config, shard=(0, processes)).train(state)
        take(train, 5)
        state = json.loads(json.dumps(train.state()))
    assert resumed == straight
    assert state["next_index"] == 15 * 8


def test_resume_with_another_batch_size_continues_the_same_rows(config):
    train = load(config, batch_size=8).train()
    first = take(train, 3)
    second = take(load(config, batch_size=4).train(train.state()), 6)
    straight = take(load(config, batch_size=8).train(), 6)
    rows = np.concatenate([batch.tokens for batch in first + second])
    np.testing.assert_array_equal(rows, np.concatenate([batch.tokens for batch in straight]))


def test_state_is_of_the_batch_returned_not_of_those_fetched_ahead(config):
    train = load(dataclasses.replace(config, prefetch=8)).train()
    assert train.next_index == 0
    next(train)
    assert train.next_index == 8 and train.state()["next_index"] == 8
    train.close()


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 8},
        {"weights": (0.5, 0.5)},
        {"shuffle_seed": 1},
        {"shuffle": False},
        {"validation_every": 4},
        {"tokenizer": "hnet-bytes"},
    ],
)
def test_position_in_other_data_is_refused(config, change):
    state = load(config).train().state()
    with pytest.raises(DataError, match="saved position is in other data"):
        load(dataclasses.replace(config, **change)).train(state)


def test_changed_text_is_refused_and_moved_text_is_not(config, tmp_path):
    state = load(config).train().state()
    moved = tmp_path / "moved.txt"
    original = (tmp_path / "first.txt").read_text()
    moved.write_text(original)
    take(load(dataclasses.replace(config, paths=(str(moved), config.paths[1]))).train(state), 1)
    moved.write_text(original.replace("a", "b"))
    with pytest.raises(DataError, match="other data"):
        load(dataclasses.replace(config, paths=(str(moved), config.paths[1]))).train(state)


def test_an_epoch_holds_every_row_once_and_the_next_is_shuffled_anew(config):
    config = dataclasses.replace(config, paths=config.paths[:1], weights=())
    data = load(config, batch_size=1)
    rows = len(data.sources[0].train)
    batches = [tuple(batch.tokens[0]) for batch in take(data.train(), 2 * rows)]
    assert sorted(batches[:rows]) == sorted(batches[rows:])
    assert len(set(batches[:rows])) == rows
    assert batches[:rows] != batches[rows:]


def test_without_shuffle_rows_are_the_text(config):
    config = dataclasses.replace(config, paths=config.paths[:1], weights=(), shuffle=False)
    data = load(config)
    rows = np.concatenate([batch.tokens for batch in take(data.train(), 3)])
    split = data.sources[0].train._split
    np.testing.assert_array_equal(rows.reshape(-1), split.read(0, rows.size))


def test_weights_are_proportions_of_rows(config):
    data = load(config)
    rows = [row for batch in take(data.train(), 50) for row in batch.tokens]
    sources = [{tuple(source.train[i].tokens) for i in range(len(source.train))} for source in data.sources]
    counts = [sum(tuple(row) in source for row in rows) for source in sources]
    assert abs(counts[0] / sum(counts) - 0.7) < 0.02
    by_size = load(dataclasses.replace(config, weights=()))
    sizes = [len(source.train) for source in by_size.sources]
    np.testing.assert_allclose(by_size._weights, np.array(sizes) / sum(sizes))


def held_out_texts(path: str, every: int) -> tuple[set, set]:
    texts = [text.strip() for text in texts_of(path)]
    held = {text for i, text in enumerate(texts) if i % every == every - 1}
    return held, set(texts) - held


def test_held_out_documents_are_never_trained_on(config):
    config = dataclasses.replace(config, paths=config.paths[:1], weights=(), shuffle=False)
    data = load(config)
    held, kept = held_out_texts(config.paths[0], 5)
    rows = len(data.sources[0].train)
    train = np.concatenate([data.sources[0].train[i].tokens for i in range(rows)])
    seen = {data.tokenizer.decode(part) for part in np.split(train, np.flatnonzero(train == 256) + 1)}
    seen = {text.strip() for text in seen}
    assert not seen & held
    assert len(seen & kept) >= len(kept) - 1  # the end of the last may not fill a row
    evaluated = np.concatenate([b.tokens[b.segment_ids > 0] for b in data.validation()])
    evaluated = {
        data.tokenizer.decode(part).strip() for part in np.split(evaluated, np.flatnonzero(evaluated == 256) + 1)
    }
    assert held - evaluated == set() or len(held - evaluated) == 1  # the very last end token is a target only
    assert not evaluated & kept


@pytest.mark.parametrize("documents", [1, 3])
def test_few_documents_hold_out_the_tail(config, tmp_path, documents):
    file = tmp_path / "few.txt"
    write_corpus(file, documents, seed=3, length=600 // documents)
    data = load(dataclasses.replace(config, paths=(str(file),), weights=()), batch_size=2)
    source = data.sources[0]
    train, held = source.train._split, source.held_out._split
    tokenizer = load_tokenizer("bytes")
    texts = file.read_text().split("\n<|endoftext|>\n")[:-1]
    flat = np.concatenate(tokenizer.encode_documents(texts))
    assert len(held) == len(flat) // 5
    np.testing.assert_array_equal(np.concatenate([train.read(0, len(train)), held.read(0, len(held))]), flat)
    assert "fewer than 5 documents" in "\n".join(data.describe())


def test_nothing_held_out_on_request(config):
    data = load(dataclasses.replace(config, validation_every=0))
    assert list(data.validation()) == [] and len(data.validation_passage(10)) == 0


def test_validation_is_complete_and_the_same_each_time(config):
    data = load(config)
    once, again = list(data.validation()), list(data.validation())
    for a, b in zip(once, again, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    # Each held-out document predicts all its tokens but the first.
    expected = sum(len(text.encode()) for path in config.paths for text in texts_of(path)[4::5])
    assert sum(batch.mask.sum() for batch in once) == expected
    assert all(batch.tokens.shape == (8, SEQ) for batch in once)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("count", [0, 12])
def test_validation_over_processes_is_the_same_rows(config, processes, count):
    def rows(loaded):
        return [tuple(map(tuple, (b.tokens[r], b.mask[r]))) for b in loaded for r in range(len(b.tokens))]

    whole = rows(load(config).validation(count))
    parts = [rows(load(config, shard=(p, processes)).validation(count)) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(whole) == sorted(row for part in parts for row in part)


def test_validation_is_the_same_rows_whatever_the_batch_size(config):
    def rows(size):
        batches = list(load(config, batch_size=size).validation(6))
        assert all(batch.tokens.shape == (size, SEQ) for batch in batches)
        return [
            tuple(row) for batch in batches for row, there in zip(batch.tokens, batch.mask, strict=True) if there.any()
        ]

    assert rows(2) == rows(4) == rows(8) and len(rows(8)) == 6


def test_a_few_validation_rows_come_from_all_corpora(config):
    data = load(config)
    rows = {tuple(row) for batch in data.validation(8) for row in batch.tokens}
    for source in data.sources:
        assert rows & {tuple(source.held_out[i].tokens) for i in range(len(source.held_out))}


def test_validation_passage_is_the_first_held_out_text(config):
    data = load(config)
    held = "".join(texts_of(config.paths[0])[4::5])  # decoding leaves the end tokens out
    passage = data.tokenizer.decode(data.validation_passage(40))
    assert len(passage) >= 38 and held.startswith(passage)


def test_bits_per_byte_of_a_uniform_guess(config):
    """Counting as an evaluation does: nats over targets, bytes from the table."""
    data = load(config)
    lengths = data.tokenizer.token_byte_lengths()
    nats = size = 0.0
    for batch in data.validation():
        nats += batch.mask.sum() * math.log(320)
        size += (lengths[batch.targets] * batch.mask).sum()
    per_document_overhead = nats / math.log(320) / size
    assert 1.0 < per_document_overhead < 1.1


def test_too_little_text(config, tmp_path):
    file = tmp_path / "small.txt"
    file.write_text("x" * 60)
    small = dataclasses.replace(config, paths=(str(file),), weights=())
    with pytest.raises(DataError, match=r"gives 3 rows .* fewer than one batch of 8"):
        load(small)
    with pytest.raises(DataError, match=r"has 49 tokens to train on, one row of data.seq_len=64 needs 65"):
        load(dataclasses.replace(small, seq_len=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ()}, "data.paths is empty"),
        ({"weights": (1.0,)}, "1 numbers for 2"),
        ({"weights": (1.0, 0.0)}, "above 0"),
        ({"weights": (1.0, float("nan"))}, "above 0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"validation_every": 1}, "validation_every=1"),
        ({"paths": ("missing.txt",), "weights": ()}, "missing.txt: no such file"),
        ({"paths": ("english",), "weights": ()}, "set data.source=embedded"),
        ({"source": "synthetic", "paths": ("nope",), "weights": ()}, "uniform, copy"),
        ({"source": "embedded", "paths": ("nope",), "weights": ()}, "english, python"),
    ],
)
def test_bad_configurations(config, change, message):
    with pytest.raises(DataError, match=message):
        load(dataclasses.replace(config, **change))


def test_sizes_that_do_not_fit(config):
    with pytest.raises(DataError, match="tokenizer bytes has 320 ids, the model 256"):
        load(config, vocab_size=256)
    with pytest.raises(DataError, match="batch_size=8 does not divide over 3"):
        load(config, shard=(0, 3))


def test_unwritable_cache_is_explained(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        load(dataclasses.replace(config, cache_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("name", ["embedded", "mixed", "synthetic"])
def test_presets_that_need_nothing(name, tmp_path):
    config = DataConfig(**DATA_PRESETS[name], cache_dir=str(tmp_path))
    data = load(config)
    batch = take(data.train(), 1)[0]
    assert batch.tokens.shape == (8, 256) and batch.tokens.max() < 320
    assert next(iter(data.validation(1))).mask.sum() > 0
    assert data.describe()


def test_english_holds_out_what_the_notice_says(tmp_path):
    data = load(DataConfig(cache_dir=str(tmp_path)))
    held = data.sources[0].held_out._split
    assert (len(held.documents) - 1, len(held)) == (8, 109_220 + 8)
