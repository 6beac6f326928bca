"""The splitter's rule, and marks that no later token changes."""

import itertools
import random
import sys

import numpy as np
import pytest

from adaptive.data import words
from adaptive.data.config import DataConfig
from adaptive.data.pipeline import open_data
from adaptive.data.tokenizers import load_tokenizer
from adaptive.data.words import WordMarker, row_marker, word_starts
from adaptive.errors import DataError

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
GERMANY, FRANCE = "\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7"

# Letters of every kind of UAX #29 and of HAT's rule, what extends them, and what joins or separates.
ALPHABET = (
    " \t\n\r'\".,:;_!-aBcD19éÉ好한ภ"
    + "\u05d0\u05d1\u30ab\u0301\u00ad\u200d\u00a0\u3000\u202f\u2044\u2019"
    + FAMILY
    + GERMANY
)


def split_words(text):
    """By the rule as it is written, without what makes marks fast; joined they are the text again."""
    starts = words._starts(words._pieces(text))
    return [text[start:stop] for start, stop in itertools.pairwise([*starts, len(text)])]


def random_texts(count, most, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, most))) for _ in range(count)]


@pytest.mark.parametrize(
    "expected",
    [
        ["Hello,", " world!"],
        ["how", "Are", "You"],
        ["how_", "are_", "you"],
        ["can'", "t", " stop"],
        ["two", "  ", "blanks,", "   ", "three"],
        ["3.", "14", " is", " 1,", "000"],
        ["x", "\r\n", "\n", "  ", "y"],
        ["(", "a)", " [", "b]!", " ..."],
        ["HTTPServer", " i", "OS"],  # a cut is between lower and upper case alone
        ["你", "好，", "世", "界。"],  # noqa: RUF001
        ["한국어", " 말"],
        ["ภ", "า", "ษ", "า"],
        ["カタカナ", "と", "漢"],
        [FAMILY, " ok"],
        [GERMANY, FRANCE, GERMANY[0]],
        [GERMANY[0], "x"],
        ["e\u0301a\u0301", " n\u0303"],
        ["1\u202f000", " 1\u20442"],
        ["\u05d0\u05d1\"", "\u05d2"],
        [" ", "\t", "a"],
        ["\u0301", "a"],
        ["a", "\u3000", "b"],
    ],
)  # fmt: skip
def test_the_rule(expected):
    assert split_words("".join(expected)) == expected


def test_no_text_has_no_words():
    assert split_words("") == []


def test_joined_words_are_the_text():
    for text in random_texts(500, 20):
        assert "".join(split_words(text)) == text


def test_the_split_of_a_beginning_is_a_beginning_of_the_split():
    letters = [c for c in ALPHABET if c not in "\u2044\u202f\u0301\u00ad\u200d"]  # these may undo the last cut
    rng = random.Random(1)
    for text in ("".join(rng.choices(letters, k=30)) for _ in range(200)):
        whole = split_words(text)
        for end in range(1, len(text)):
            *settled, growing = split_words(text[:end])
            assert settled == whole[: len(settled)]
            assert "".join(whole[len(settled) :]).startswith(growing)


# Marks


BYTES = load_tokenizer("bytes")


def marks(data: bytes) -> np.ndarray:
    return word_starts(np.frombuffer(data, np.uint8).astype(np.int32), np.ones(len(data), np.int32), BYTES.token_bytes)


def by_definition(text: str) -> list[bool]:
    """Of the bytes of a document: the last word up to a byte begins later than up to any byte before."""
    out, latest = [], -1
    for number, character in enumerate(text):
        begin = number + 1 - len(split_words(text[: number + 1])[-1])
        out += [False] * (len(character.encode()) - 1) + [begin > latest]
        latest = max(latest, begin)
    return [True, *out[1:]]


def test_marks_are_where_words_begin():
    text = "Hello, world!  howAreYou can't"
    cut = [text.encode()[i:j].decode() for i, j in pairs(marks(text.encode()))]
    assert cut == split_words(text) == ["Hello,", " world!", "  ", "how", "Are", "You", " can'", "t"]


def pairs(marked):
    at = np.flatnonzero(marked).tolist()
    return zip(at, [*at[1:], len(marked)], strict=True)


def test_marks_come_with_the_last_byte_of_a_character():
    assert marks("a好b".encode()).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("seed", range(4))
def test_marks_are_those_of_their_definition(seed):
    for text in random_texts(100, 12, seed):
        assert marks(text.encode()).tolist() == by_definition(text), text


@pytest.mark.parametrize("alphabet", ["".join(map(chr, range(128))), " aB1.,'\n\r_$"])
def test_marks_of_ascii_are_where_the_rule_cuts(alphabet):
    """Looked up for all characters at once, beside the rule as it is written."""
    text = "".join(random.Random(2).choices(alphabet, k=4000))
    begins = itertools.accumulate(map(len, split_words(text)[:-1]), initial=0)
    assert np.flatnonzero(marks(text.encode())).tolist() == list(begins)


def test_marks_of_long_mixed_texts_are_those_of_their_tokens_one_by_one():
    for text in random_texts(10, 400, 4):
        text = " and then some ".join(text[i : i + 5] for i in range(0, len(text), 5))
        marker = WordMarker(BYTES.token_bytes)
        assert [marker.push(byte) for byte in text.encode()] == marks(text.encode()).tolist()


def test_a_mark_that_proves_wrong_stays_and_the_next_word_is_marked():
    text = "1\u20442 x"  # a fraction: one word, but its stroke begins a word until the 2 has come
    assert split_words("1\u2044") == ["1", "\u2044"] and split_words(text) == ["1\u20442", " x"]
    assert marks(text.encode()).tolist() == [True, False, False, True, False, True, False]


def test_later_bytes_change_no_earlier_mark():
    rng = np.random.default_rng(0)
    for text in random_texts(60, 12, 7):
        data = text.encode()
        for other in (rng.integers(0, 256, len(data)).astype(np.uint8).tobytes(), text[::-1].encode()):
            cut = int(rng.integers(0, len(data) + 1))
            assert marks(data[:cut] + other)[:cut].tolist() == marks(data)[:cut].tolist()


def test_tokens_one_by_one_are_marked_as_rows_are():
    rng = np.random.default_rng(0)
    texts = [text.encode() for text in random_texts(60, 30, 3)]
    broken = [rng.integers(0, 256, 40).astype(np.uint8).tobytes() for _ in range(20)] + [t[1:] for t in texts if t[1:]]
    for data in texts + broken:
        marker = WordMarker(BYTES.token_bytes)
        assert [marker.push(byte) for byte in data] == marks(data).tolist()


def test_documents_are_marked_apart_and_specials_begin_their_document_alone():
    tokenizer = load_tokenizer("hnet-bytes")
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    ids = np.array([*b"lo ", end, begin, *b"so", end, begin, end, 0, 0], np.int32)
    segments = np.array([1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], np.int32)
    expected = [1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0]
    assert word_starts(ids, segments, tokenizer.token_bytes).astype(int).tolist() == expected


def test_padding_marks_the_first_token_of_a_row_alone():
    assert word_starts(np.zeros(4, np.int32), np.zeros(4, np.int32), BYTES.token_bytes).tolist() == [True] + [False] * 3


def test_a_token_of_several_words_is_marked_once():
    pieces = {0: b"so", 1: b"me wo", 2: b"rds", 3: b"", 4: "é".encode()[:1], 5: "é".encode()[1:] + b" x"}
    ids = np.array([0, 1, 2, 3, 4, 5, 2], np.int32)
    expected = [True, True, False, False, False, True, False]  # "words" goes on with "é", " x" begins anew
    assert word_starts(ids, np.ones(7, np.int32), pieces.__getitem__).tolist() == expected
    marker = WordMarker(pieces.__getitem__)
    assert [marker.push(token) for token in ids] == expected


def test_a_long_text_keeps_little():
    marker = WordMarker(BYTES.token_bytes)
    for byte in b"some words, and more; " * 20:
        marker.push(byte)
    assert len(marker._words._text) < 20


# Data


def test_rows_carry_boundaries_on_request(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Hello, world! How are you?\n" * 40)
    plain = DataConfig(source="files", paths=(str(path),), seq_len=16, validation_every=4, cache_dir=str(tmp_path))
    marked = DataConfig(**{**plain.__dict__, "boundaries": "words"})
    a, b = (open_data(config, batch_size=2, vocab_size=320) for config in (plain, marked))
    assert a.fingerprint != b.fingerprint
    for without, having in ((a.train(), b.train()), (a.validation(), b.validation())):
        for _ in range(2):
            row, same = next(without), next(having)
            assert row.boundaries is None
            np.testing.assert_array_equal(row.tokens, same.tokens)
            expected = [
                word_starts(t, s, BYTES.token_bytes) for t, s in zip(same.tokens, same.segment_ids, strict=True)
            ]
            np.testing.assert_array_equal(same.boundaries, expected)


def test_rows_of_streams_carry_boundaries(monkeypatch):
    from adaptive.data.batch import Group
    from adaptive.data.shards import Shard
    from adaptive.data.streaming import StreamedData

    class Stream:
        name = "test"

        def groups(self, position):
            yield Group({"row": 0}, 0, ["Hello, world!", "How are you?"])

        def parts(self):
            return [self]

    config = DataConfig(seq_len=8, validation_every=0, boundaries="words")
    data = StreamedData(config, BYTES, [Stream()], Shard(0, 1, 2))
    batch = next(data.train())
    assert batch.boundaries.shape == (2, 8) and batch.boundaries.dtype == bool
    expected = [word_starts(t, s, BYTES.token_bytes) for t, s in zip(batch.tokens, batch.segment_ids, strict=True)]
    np.testing.assert_array_equal(batch.boundaries, expected)


def test_synthetic_tasks_have_no_words():
    with pytest.raises(DataError, match=r"data\.boundaries=words needs text"):
        open_data(DataConfig(source="synthetic", paths=("copy",), boundaries="words"), batch_size=1, vocab_size=320)


def test_a_missing_package_is_named_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    words._patterns.cache_clear()
    assert row_marker("none", BYTES)("row") == "row"
    with pytest.raises(DataError, match=r"pip install 'adaptive-lm\[words\]'"):
        row_marker("words", BYTES)
