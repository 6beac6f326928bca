"""Texts encoded by pieces are what the library makes of the whole texts."""

import random

import numpy as np
import pytest

from adaptive.data import pieces
from adaptive.data.corpus import embedded_file
from adaptive.data.pieces import Pieces, cutting

tokenizers = pytest.importorskip("tokenizers")

# Blanks of every kind, what joins letters, punctuation takes along, or an added token is made of.
ALPHABET = [
    *" \t\n\r'\".,:;_!-aBcDst19éÉ好한/(~$<",
    *"\x00\x0b\x0c\x1c\x85\xa0\u0301\u05d0\u200b\u200d\u2019\u2028\u202f\u2044\u3000\U0001f468\ufeff",
    *("  ", "\n\n", "'s", "'ll", " the", "<tool>", "foo", "foo(", "<|endoftext|>", " and", "x1"),
]


def byte_level(**options):
    return tokenizers.pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True} | options)


def split(pattern, behavior="isolated"):
    parts = tokenizers.pre_tokenizers
    return parts.Sequence([parts.Split(tokenizers.Regex(pattern), behavior), byte_level(use_regex=False)])


def library(pre_tokenizer=None, normalizer=None, added=()):
    made = tokenizers.Tokenizer.from_file(str(embedded_file("bpe-4096.json")))
    made.encode_special_tokens = True
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(list(added))
    return made


KNOWN = {
    "own": {},
    "gpt-2": {"pre_tokenizer": byte_level()},
    "added": {"added": ("<tool>", "foo(")},
    **{f"line {i}": {"pre_tokenizer": split(pattern)} for i, pattern in enumerate(pieces._CUT_AT_LINES)},
    **{f"blank {i}": {"pre_tokenizer": split(pattern)} for i, pattern in enumerate(pieces._CUT_AT_BLANKS)},
    "nfc": {"pre_tokenizer": byte_level(), "normalizer": tokenizers.normalizers.NFC()},
}


@pytest.mark.parametrize("name", KNOWN)
def test_ids_are_those_of_the_library(name, monkeypatch):
    monkeypatch.setattr(pieces, "_REMEMBERED", 2000)  # it begins anew on the way
    encoder = library(**KNOWN[name])
    some = Pieces(encoder, cutting(encoder))
    rng = random.Random(len(name))
    for dense in (True, False):
        monkeypatch.setattr(pieces, "_SPARSE", 1000 if dense else 4)
        for _ in range(5):
            texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 40))) for _ in range(200)]
            expected = encoder.encode_batch_fast(texts, add_special_tokens=False)
            for text, ids, encoding in zip(texts, some.encode(texts), expected, strict=True):
                assert ids.dtype == np.int32 and ids.tolist() == encoding.ids, text


@pytest.mark.parametrize(
    "other",
    [
        {"pre_tokenizer": byte_level(add_prefix_space=True)},
        {"pre_tokenizer": byte_level(use_regex=False)},
        {"pre_tokenizer": split(r"\w+|\W+")},
        {"pre_tokenizer": split(pieces._CUT_AT_LINES[0], "merged_with_next")},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Metaspace()},
        {"normalizer": tokenizers.normalizers.Prepend("x")},
        {"added": ("two words",)},
        {"added": (tokenizers.AddedToken("x", lstrip=True),)},
    ],
)
def test_what_is_not_known_to_keep_pieces_apart_is_left_to_the_library(other):
    assert cutting(library(**other)) is None


def test_long_pieces_are_not_remembered():
    encoder = library()
    some = Pieces(encoder, cutting(encoder))
    some.encode(["a " + "b" * 100 + " c d e f g h i j k"])
    assert " c" in some._known and max(map(len, some._known)) <= pieces._LONG
