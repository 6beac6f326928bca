"""Text to token ids and back: bytes, H-Net's bytes, and any `tokenizer.json`.

The byte tokenizers import nothing; the others need the `tokenizers` package (`pip install 'adaptive[bpe]'`).
"""

import abc
import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.data.corpus import embedded_file
from adaptive.data.huggingface import hub_tokenizer
from adaptive.errors import DataError

BUILT_IN = ("bytes", "hnet-bytes", "bpe-4096")
END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")


class Tokenizer(abc.ABC):
    """Text to ids and back.

    name         str         how the recipe calls it
    vocab_size   int         every id is below it
    bos_id       int | None  put before each document, where the convention has one
    eos_id       int         put after each document
    fingerprint  str         sha256 (hex) of what defines the ids; a token store remembers it
    """

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """i32[tokens] of `text` alone. Nothing in the text is read as a special token."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one token stands for; empty for specials and for ids outside the vocabulary."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """i32[tokens] of each text with the begin and end tokens of the convention around it."""
        return [self._delimit(self.encode(text)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without specials; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        return np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)], np.int32)

    def token_byte_lengths(self) -> np.ndarray:
        """i32[vocab_size]: UTF-8 bytes each token stands for, 0 for specials: the denominator of bits per byte."""
        return self._byte_lengths

    def _delimit(self, ids: np.ndarray) -> np.ndarray:
        begin = [] if self.bos_id is None else [self.bos_id]
        return np.concatenate([np.array(begin, np.int32), ids, np.array([self.eos_id], np.int32)])


class StreamDecoder:
    """Text of tokens that arrive one by one; a character whose bytes are incomplete waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What can be shown now that `token` has arrived."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token)))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


class Bytes(Tokenizer):
    """Ids 0 to 255 are bytes, 256 ends a document, 257 pads; the vocabulary is rounded up to a multiple of 64."""

    name = "bytes"
    vocab_size = 320
    eos_id = 256
    pad_id = 257
    fingerprint = hashlib.sha256(b"bytes: id = byte, end 256, pad 257, vocabulary 320").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""


class HNetBytes(Bytes):
    """H-Net's convention: vocabulary 256, begin 254, end 255, bytes that valid UTF-8 never holds.

    Source: the H-Net paper's released code, hnet/utils/tokenizers.py.
    """

    name = "hnet-bytes"
    vocab_size = 256
    bos_id = 254
    eos_id = 255
    pad_id = 255
    fingerprint = hashlib.sha256(b"hnet-bytes: id = byte, begin 254, end 255, vocabulary 256").hexdigest()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 254 else b""


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library. Raises DataError if it is malformed or names no end of text."""

    def __init__(self, name: str, path: Path):
        content = path.read_bytes()
        self.name = name
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._tokenizer = _parse(content, path)
        # Text of users is text: a marker such as <|endoftext|> inside it must not become a special token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._pieces = {token: piece for piece, token in vocabulary.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        self._literal = {token: entry.content for token, entry in added.items() if not entry.special}
        self._decoders = _decoder_types(json.loads(content).get("decoder"))
        self.eos_id = _end_of_text(vocabulary, path)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(_clean(text), add_special_tokens=False).ids, np.int32)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [self._delimit(np.array(encoding.ids, np.int32)) for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None or token in self._special or token == self.eos_id:
            return b""
        if token in self._literal:
            return self._literal[token].encode()
        if "ByteLevel" in self._decoders:
            return bytes(_byte_level_alphabet()[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()  # SentencePiece writes a blank as U+2581


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: `bytes`, `hnet-bytes`, `bpe-4096`, a path, or a name on the Hugging Face hub.

    A path is a `tokenizer.json` or a folder with one. Raises DataError naming what is missing and the choices.
    """
    if name == "bytes":
        return Bytes()
    if name == "hnet-bytes":
        return HNetBytes()
    if name in BUILT_IN:
        return JsonTokenizer(name, embedded_file(f"{name}.json"))
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return JsonTokenizer(name, path)
    if _looks_like_a_path(name):
        raise DataError(f"data.tokenizer={name}: no file {path}. Give a tokenizer.json, or one of {_choices()}")
    return JsonTokenizer(name, hub_tokenizer(name))


def _choices() -> str:
    return ", ".join(BUILT_IN)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".json", ".model")) or name.count("/") != 1


def _clean(text: str) -> str:
    """`text` without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()


def _parse(content: bytes, path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"the tokenizer {path} needs a package: pip install 'adaptive[bpe]'") from None
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None


def _decoder_types(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", [])))


def _end_of_text(vocabulary: dict[str, int], path: Path) -> int:
    config = path.with_name("tokenizer_config.json")
    named = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    for candidate in (named, *_END_NAMES):
        if candidate in vocabulary:
            return vocabulary[candidate]
    raise DataError(f"data.tokenizer: {path} has no end-of-text token; looked for {', '.join(_END_NAMES)}")


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2, bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
