"""Text to tokens by pieces, most of which were met before: several times as fast as the `tokenizers` library alone.

A byte-level BPE cuts a text by a regular expression before it looks for tokens. Those in use never have a blank behind
a character that is none in one piece, so a text may be cut before any such blank, and encoded in parts.
"""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2's, in which a line break never follows what is no blank either.
_CUT_AT_LINES = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
# Punctuation takes line breaks along: Llama 3 and cl100k, Qwen 2, o200k.
_CUT_AT_BLANKS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_LETTERS}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_LETTERS}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}",
)
# What a text may be cut into. Blanks beyond ASCII end nothing, as the libraries differ in what they are.
_WORD = r"\s*+[^\sA-Za-z0-9]*+[A-Za-z0-9]++(?=[!-&(-/:-@\[-`{-~ \t\r\n]|\Z)"  # and what is before it
_TO_BLANK = r"\s*\S+(?:[^\S \t\r\n]\s*\S*)*"
_TO_BLANK_NO_LINE = r"\s*\S+(?:(?:[^\S \t\r\n]|(?<![A-Za-z0-9])[\r\n])\s*\S*)*"

_REMEMBERED = 1 << 18  # pieces; then it begins anew. They take about 50 MB
_LONG = 64  # characters of a piece that is not remembered
_SPARSE = 24  # characters a piece, from which on a text has none that come again, as one without blanks


class Pieces:
    """Encodes many texts with `encoder`, a `tokenizers.Tokenizer` that `cutting` knows a pattern for."""

    def __init__(self, encoder: Any, pattern: re.Pattern[str]):
        self._encoder = encoder
        self._cut = pattern.findall
        self._known: dict[str, bytes] = {}  # i32 ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """i32[tokens] of each text, just as the library gives them; may raise what it raises."""
        cut = [self._cut(text) for text in texts]
        cut = [[text] if len(text) > _SPARSE * len(pieces) else pieces for text, pieces in zip(texts, cut, strict=True)]
        known = self._known
        new = list(dict.fromkeys(itertools.filterfalse(known.__contains__, itertools.chain.from_iterable(cut))))
        encodings = self._encoder.encode_batch_fast(new, add_special_tokens=False)
        known.update((piece, np.array(one.ids, np.int32).tobytes()) for piece, one in zip(new, encodings, strict=True))
        ids = [np.frombuffer(b"".join(map(known.__getitem__, pieces)), np.int32) for pieces in cut]
        for piece in new:
            if len(piece) > _LONG:
                del known[piece]
        if len(known) > _REMEMBERED:
            known.clear()
        return ids


def cutting(encoder: Any) -> re.Pattern[str] | None:
    """What cuts a text into pieces that `encoder` encodes apart as it does together; None where none is known to.

    Asked for are byte-level BPE behind a known pattern, no normaliser but NFC, and no added token that blanks can be
    part of.
    """
    tree = json.loads(encoder.to_str())
    normalizer = tree["normalizer"]
    if tree["model"]["type"] != "BPE" or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    added = [entry for entry in tree["added_tokens"] if not entry["special"]]
    if any(_takes_blanks(entry) for entry in added):
        return None
    steps = tree["pre_tokenizer"] or {"type": "None"}
    cuts = [_cuts(step) for step in (steps["pretokenizers"] if steps["type"] == "Sequence" else [steps])]
    if None in cuts or not any(cuts):
        return None
    # Punctuation may be within an added token; otherwise it ends what is of letters and digits.
    parts = [*([] if added else [_WORD]), _TO_BLANK_NO_LINE if "blanks" in cuts else _TO_BLANK, r"\s+"]
    return re.compile("|".join(parts))


def _takes_blanks(entry: dict) -> bool:
    flags = entry["single_word"] or entry["lstrip"] or entry["rstrip"]
    return flags or any(character.isspace() for character in entry["content"])


def _cuts(step: dict) -> str | None:
    """Where a step of the pre-tokenizer surely cuts: "lines", "blanks", or "" nowhere; None: not known to keep apart
    what is cut."""
    if step["type"] == "Digits":
        return ""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "lines" if step["use_regex"] else ""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"].get("Regex")
        return "lines" if pattern in _CUT_AT_LINES else "blanks" if pattern in _CUT_AT_BLANKS else None
    return None
