"""The bytes of text that each token of a `tokenizer.json` stands for, as the library's own decoder has it."""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from adaptive.data.tokenizer_files import TokenizerFiles, explained

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_ANCHORS = 256  # tokens that are tried as neighbours


class TokenTexts(NamedTuple):
    """UTF-8 bytes of each token that stands for text.

    inside    within a text
    opening   at its beginning, where a decoder may drop a blank
    by_bytes  whether a text is the bytes of its tokens, one after the other, wherever they stand
    closing   bytes that the last token of a text has and its text has not: a blank behind each word, but the last
    """

    inside: dict[int, bytes]
    opening: dict[int, bytes]
    by_bytes: bool
    closing: int = 0


def token_texts(files: TokenizerFiles, hidden: Iterable[int]) -> TokenTexts:
    """The bytes of all tokens but the `hidden` ones.

    Byte-level vocabularies spell bytes with characters. The others are asked what their decoder makes of each token
    between two others, and before one. Where a token is one byte of a character, it is that byte.
    """
    without = frozenset(hidden)
    pieces = {token: piece for piece, token in files.vocabulary.items() if token not in without}
    if "ByteLevel" in files.decoders:
        literal = {
            token: entry.content.encode()
            for token, entry in files.library.get_added_tokens_decoder().items()
            if token in pieces
        }
        texts = {token: literal.get(token) or _spelt(piece) for token, piece in pieces.items()}
        return TokenTexts(texts, texts, by_bytes=True)
    return _asked(files, pieces)


def _asked(files: TokenizerFiles, pieces: dict[int, str]) -> TokenTexts:
    """The texts that the library's decoder gives."""

    def decoded(*rows: list[int]) -> list[str]:
        with explained("the decoder of the tokenizer.json cannot make text of its tokens"):
            return files.library.decode_batch(list(rows), skip_special_tokens=False)

    alone = dict(zip(pieces, decoded(*([token] for token in pieces)), strict=True))
    single = _single_bytes(pieces) if "ByteFallback" in files.decoders else {}
    asked = [token for token in pieces if token not in single]
    known = [token for token in asked if alone[token][-1:].isalnum()][:_ANCHORS]
    pairs = dict(zip(known, decoded(*([token, token] for token in known)), strict=True))
    usable = [token for token in known if _follows(pairs[token], alone[token])]
    if not usable:
        texts = {token: alone[token].encode() for token in asked} | single
        return TokenTexts(texts, texts, by_bytes=False)
    # Best one that adds nothing of its own to its text.
    anchor = min(usable, key=lambda token: len(pairs[token]) != 2 * len(alone[token]))
    head, tail = alone[anchor], pairs[anchor][len(alone[anchor]) :]
    behind = "BPEDecoder" in files.decoders  # marks ends of words, where blanks are
    if behind:
        head, tail = pairs[anchor][: -len(alone[anchor])], alone[anchor]
    inside, opening = (
        decoded(*([anchor, token, anchor] for token in asked)),
        decoded(*([token, anchor] for token in asked)),
    )
    return TokenTexts(
        {token: _cut(text, head, tail, alone[token]) for token, text in zip(asked, inside, strict=True)} | single,
        {token: _cut(text, "", tail, alone[token]) for token, text in zip(asked, opening, strict=True)}
        | {token: byte if alone[token] else b"" for token, byte in single.items()},
        by_bytes=False,
        closing=int(behind),
    )


def _follows(pair: str, once: str) -> bool:
    """Whether a token that follows itself leaves the first as it was."""
    return pair.startswith(once) and len(pair) > len(once)


def _cut(text: str, head: str, tail: str, otherwise: str) -> bytes:
    """`text` without its ends; `otherwise` where it has others."""
    whole = len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail)
    return (text[len(head) : len(text) - len(tail)] if whole else otherwise).encode()


def _single_bytes(pieces: dict[int, str]) -> dict[int, bytes]:
    """Tokens that are a byte each, as <0x0A>: what has no token of its own is spelt with them."""
    found = {token: _BYTE.fullmatch(piece) for token, piece in pieces.items()}
    return {token: bytes.fromhex(match[1]) for token, match in found.items() if match}


def _spelt(piece: str) -> bytes:
    """The bytes that a piece spells; what holds other characters than those that spell bytes is itself."""
    alphabet = byte_level_alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2, bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
