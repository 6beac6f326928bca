import numpy as np
import pytest

from adaptive.data.store import TokenStore
from adaptive.data.windows import Split, Windows


def make_store(lengths: list[int], shard_sizes: list[int] | None = None) -> TokenStore:
    """Documents of the given lengths; the token at index i is i, so that every read can be told apart."""
    total = sum(lengths)
    cuts = np.cumsum(shard_sizes or [])
    shards = tuple(part for part in np.split(np.arange(total, dtype=np.uint16), cuts) if len(part))
    return TokenStore("test", shards, np.concatenate([[0], np.cumsum(lengths)]), total - 1, "")


def whole(store: TokenStore, seq_len: int, **options) -> Windows:
    return Windows(
        Split(store, "train", 0), seq_len, **{"partial": True, "cross_document": False, "filler": 9} | options
    )


def expected_row(lengths: list[int], start: int, seq_len: int) -> tuple[list, list, list]:
    """Positions, segments and mask of a window by walking over it token by token."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.concatenate([np.arange(n) for n in lengths])
    positions, segments, mask = [], [], []
    for i in range(start, start + seq_len):
        if i + 1 >= len(document):
            values = (0, 0, 0)
        else:
            of_first = document[i] == document[start]
            values = (
                i - start if of_first else offset[i],
                document[i] - document[start] + 1,
                document[i] == document[i + 1],
            )
        for column, value in zip((positions, segments, mask), values, strict=True):
            column.append(int(value))
    return positions, segments, mask


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_exact(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 14, 30).tolist()
    windows = whole(make_store(lengths, [17, 40, 3]), 8)
    total = sum(lengths)
    assert len(windows) == -(-(total - 1) // 8)
    for w in range(len(windows)):
        row = windows[w]
        used = min(8, total - 1 - 8 * w)
        np.testing.assert_array_equal(row.tokens[:used], np.arange(8 * w, 8 * w + used))
        np.testing.assert_array_equal(row.targets[:used], np.arange(8 * w + 1, 8 * w + used + 1))
        positions, segments, mask = expected_row(lengths, 8 * w, 8)
        assert row.positions.tolist() == positions
        assert row.segment_ids.tolist() == segments
        assert row.mask.tolist() == mask


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 10, 15, 16, 17, 40])
def test_with_any_stride_every_token_is_a_target_once_and_has_its_context(stride, total):
    windows = whole(make_store([total]), 8, stride=stride)
    counted = [[(int(t), int(i)) for i, t in enumerate(row.targets) if row.mask[i]] for row in map(windows.__getitem__,
               range(len(windows)))]  # fmt: skip
    assert [target for row in counted for target, _ in row] == list(range(1, total))
    assert all(before + 1 >= 8 - stride for row in counted[1:] for _, before in row)
    assert all(counted)


def test_targets_know_their_documents():
    lengths = [5, 1, 9, 3]
    windows = whole(make_store(lengths), 4, stride=3)
    document = np.repeat(np.arange(4), lengths)
    for w in range(len(windows)):
        row = windows[w]
        np.testing.assert_array_equal(windows.documents(w)[row.mask > 0], document[row.targets[row.mask > 0]])


def test_windows_made_together_are_those_made_apart():
    rng = np.random.default_rng(2)
    windows = whole(make_store(rng.integers(0, 14, 60).tolist(), [17, 40, 3]), 8)
    chosen = rng.permutation(len(windows))
    together = windows.rows(chosen)
    for row, index in enumerate(chosen.tolist()):
        for field, apart in zip(together[:5], windows[index][:5], strict=True):
            np.testing.assert_array_equal(field[row], apart)


def test_a_document_without_tokens_changes_nothing():
    with_empty, without = (whole(make_store(lengths), 8) for lengths in ([3, 0, 0, 4, 9], [3, 4, 9]))
    for field, same in zip(with_empty[0][:5], without[0][:5], strict=True):
        np.testing.assert_array_equal(field, same)


def test_every_token_is_a_target_once():
    windows = whole(make_store([100]), 7)
    targets = [t for i in range(len(windows)) for t, m in zip(windows[i].targets, windows[i].mask, strict=True) if m]
    assert targets == list(range(1, 100))


def test_crossing_documents_on_request():
    row = whole(make_store([3, 4, 9]), 8, cross_document=True)[0]
    assert row.positions.tolist() == list(range(8)) and row.mask.tolist() == [1] * 8
    assert row.segment_ids.tolist() == [1] * 8


def test_training_drops_the_partial_window():
    store = make_store([20])
    assert len(whole(store, 8)) == 3 and len(whole(store, 8, partial=False)) == 2
    assert len(whole(make_store([17]), 8, partial=False)) == 2
    assert len(whole(make_store([16]), 8, partial=False)) == 1


@pytest.mark.parametrize("every", [2, 3, 5])
def test_splits_are_disjoint_complete_and_whole_documents(every):
    rng = np.random.default_rng(every)
    lengths = rng.integers(1, 9, 23).tolist()
    store = make_store(lengths, [11, 30])
    parts = {which: Split(store, which, every) for which in ("train", "validation")}
    document = np.repeat(np.arange(len(lengths)), lengths)
    for which, split in parts.items():
        held = which == "validation"
        expected = np.flatnonzero((document % every == every - 1) == held)
        np.testing.assert_array_equal(split.read(0, len(split)), expected)
        for _ in range(20):
            start, stop = np.sort(rng.choice(len(split) + 1, 2, replace=False))
            np.testing.assert_array_equal(split.read(start, stop), expected[start:stop])
        kept = [n for i, n in enumerate(lengths) if (i % every == every - 1) == held]
        np.testing.assert_array_equal(np.diff(split.documents), kept)


@pytest.mark.parametrize("lengths", [[100], [30, 70], [95, 5], [96, 4], [1] * 9])
def test_tail_split_of_few_documents(lengths):
    store = make_store(lengths)
    train, held = Split(store, "train", 20), Split(store, "validation", 20)
    cut = len(store) - len(store) // 20
    np.testing.assert_array_equal(train.read(0, cut), np.arange(cut))
    assert len(train) == cut and len(held) == len(store) - cut
    if len(held):
        np.testing.assert_array_equal(held.read(0, len(held)), np.arange(cut, len(store)))


@pytest.mark.parametrize("shards", [(3 << 31,), (1 << 31, 5, (1 << 32) - 5)])
def test_positions_beyond_32_bits(shards):
    """A store of more tokens than an i32 counts, none of which takes memory."""
    parts = tuple(np.broadcast_to(np.uint16(7 + i), (size,)) for i, size in enumerate(shards))
    documents = np.array([0, 10, (1 << 31) + 3, (1 << 32) + 1, 3 << 31], np.int64)
    store = TokenStore("large", parts, documents, 9, "")
    rows = whole(store, 4)
    assert len(rows) == (sum(shards) - 1 + 3) // 4
    at = (1 << 30) + 0  # the row of token 2^32: one token before a document
    row = rows[at]
    assert row.segment_ids.tolist() == [1, 2, 2, 2] and row.positions.tolist() == [0, 0, 1, 2]
    assert row.tokens.dtype == row.positions.dtype == np.int32
    held = Split(store, "validation", 2)
    assert len(held) == int(np.diff(documents)[1::2].sum()) and held.documents.dtype == np.int64
    assert held.read(len(held) - 2, len(held)).tolist() == store.read((3 << 31) - 2, 3 << 31).tolist()
