"""Text to token ids and back: bytes, H-Net's bytes, and any `tokenizer.json`.

The byte tokenizers import nothing; the others need the `tokenizers` package (`pip install 'adaptive-lm[bpe]'`).
"""

import abc
import codecs
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive.data.corpus import embedded_file
from adaptive.data.huggingface import hub_tokenizer
from adaptive.data.pieces import Pieces, cutting
from adaptive.data.token_texts import TokenTexts, token_texts
from adaptive.data.tokenizer_files import CONFIG, TokenizerFiles, explained, read_tokenizer
from adaptive.errors import DataError
from adaptive.paths import local_path
from adaptive.printable import printable

BUILT_IN = ("bytes", "hnet-bytes", "bpe-4096")


class ByteCounts(NamedTuple):
    """UTF-8 bytes of text that tokens stand for: the denominator of bits per byte. Arrays of numpy or of jax.

    inside   i32[vocab]   of a token within a text; 0 for markers, below that for one that ends a text and takes a blank
                          back
    opening  i32[vocab]   of a token that opens one, which may lose the blank that a convention puts before every text;
                          None where that changes nothing
    borders  bool[vocab]  tokens that a text begins after; None where `opening` is
    """

    inside: Any
    opening: Any = None
    borders: Any = None

    def of(self, tokens: Any, before: Any) -> Any:
        """i32[...] bytes of tokens i32[...], each of which stands after the one in `before` i32[...]."""
        if self.opening is None:
            return self.inside[tokens]
        return self.inside[tokens] + self.borders[before] * (self.opening - self.inside)[tokens]


class Tokenizer(abc.ABC):
    """Text to ids and back.

    name         str         how the recipe calls it
    vocab_size   int         every id is below it
    bos_id       int | None  put before each document and each prompt, where the convention has one
    eos_id       int         put after each document
    mask_id      int | None  stands for a hidden token, where the convention has one
    fingerprint  str         sha256 (hex) of what defines the ids of a document; a token store remembers it
    closing      int         blanks that the last token of a text has and its text has not
    """

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int
    mask_id: int | None = None
    fingerprint: str
    closing: int = 0

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """i32[tokens] of `text` alone. Nothing in the text is read as a special token."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one token stands for within a text; empty for specials and for ids outside the vocabulary."""

    def opening_bytes(self, token: int) -> bytes:
        """As `token_bytes`, of a token that opens a text."""
        return self.token_bytes(token)

    def is_special(self, token: int) -> bool:
        """Whether the token is a marker or outside the vocabulary, and stands for no text anywhere."""
        return not self.token_bytes(token)

    def describe(self, token: int) -> str:
        """How a message calls the token."""
        return f"token {token}"

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """i32[tokens] of each text with the begin and end tokens of the convention around it."""
        return [self._delimit(self.encode(text)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without specials; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    def describe_borders(self) -> str:
        """What documents and prompts begin with, and what documents end with."""
        begin = "no token" if self.bos_id is None else self.describe(self.bos_id)
        end = self.describe(self.eos_id)
        return f"each document and each prompt begins with {begin}, and each document ends with {end}"

    @property
    def borders(self) -> tuple[int, ...]:
        """Ids that stand between texts."""
        return (self.eos_id,) if self.bos_id is None else (self.bos_id, self.eos_id)

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        return np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)], np.int32)

    def token_byte_lengths(self) -> np.ndarray:
        """i32[vocab_size]: UTF-8 bytes each token stands for within a text, 0 for specials."""
        return self._byte_lengths

    def byte_counts(self) -> ByteCounts:
        """Bytes of each token [vocab_size], wherever it stands."""
        return ByteCounts(self.token_byte_lengths())

    def text_size(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of one document, `ids` i32[tokens]."""
        counts = self.byte_counts()
        shown = ids[counts.inside[ids] > 0]
        size = int(counts.of(shown, np.append(self.eos_id, shown)[:-1]).sum())
        more = shown.size and self.token_bytes(int(shown[-1])).endswith(b" ")
        return size - self.closing * bool(more)

    def _delimit(self, ids: np.ndarray) -> np.ndarray:
        begin = [] if self.bos_id is None else [self.bos_id]
        return np.concatenate([np.array(begin, np.int32), ids, np.array([self.eos_id], np.int32)])


class StreamDecoder:
    """Text of tokens that arrive one by one; a character whose bytes are incomplete waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._opening, self._held = True, b""  # a blank that stays only where the text goes on

    def push(self, token: int) -> str:
        """What can be shown now that `token` has arrived."""
        tokenizer, token = self._tokenizer, int(token)
        content = self._held + (tokenizer.opening_bytes(token) if self._opening else tokenizer.token_bytes(token))
        ends = token in tokenizer.borders
        self._opening = ends or (self._opening and tokenizer.is_special(token))
        self._held = content[-tokenizer.closing :] if tokenizer.closing and content.endswith(b" ") else b""
        content = content[: len(content) - len(self._held)]
        self._held = b"" if ends else self._held
        return self._decoder.decode(content)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


class Bytes(Tokenizer):
    """Ids 0 to 255 are bytes, 256 ends a document, 257 pads, 258 stands for a hidden token; the vocabulary is rounded
    up to a multiple of 64."""

    name = "bytes"
    vocab_size = 320
    eos_id = 256
    pad_id = 257
    mask_id: int | None = 258
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
    bos_id: int | None = 254
    eos_id = 255
    pad_id = 255
    mask_id = None
    fingerprint = hashlib.sha256(b"hnet-bytes: id = byte, begin 254, end 255, vocabulary 256").hexdigest()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 254 else b""


class _NoBegin(HNetBytes):
    """H-Net's bytes for documents that nothing begins."""

    bos_id = None
    fingerprint = hashlib.sha256(b"hnet-bytes: id = byte, no begin, end 255, vocabulary 256").hexdigest()


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, as `read_tokenizer` gives it."""

    def __init__(self, name: str, files: TokenizerFiles):
        self.name = name
        self.fingerprint = files.sha256
        self.bos_id, self.eos_id, self.mask_id = files.begin, files.end, files.mask
        self.vocab_size = max(files.vocabulary.values()) + 1
        self._files = files

    def encode(self, text: str) -> np.ndarray:
        return self._encoded([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._delimit(ids) for ids in self._encoded(texts, self._pieces)]

    def token_bytes(self, token: int) -> bytes:
        return self._texts.inside.get(token, b"")

    def piece(self, token: int) -> str:
        """How the file spells the token."""
        return str(self._files.library.id_to_token(token))

    def markers(self) -> dict[str, int]:
        """Text and id of each marker, which no text is read as."""
        return {self.piece(token): token for token in self._files.special.union(self.borders)}

    @property
    def library(self) -> Any:
        """The `tokenizers.Tokenizer` that encodes."""
        return self._files.encoder

    def to_json(self) -> str:
        """The tokenizer.json."""
        return str(self._files.library.to_str())

    def opening_bytes(self, token: int) -> bytes:
        return self._texts.opening.get(token, b"")

    def is_special(self, token: int) -> bool:
        return token not in self._texts.inside

    def describe(self, token: int) -> str:
        return f"{printable(self._files.library.id_to_token(token))} (token {token})"

    def decode(self, ids: Iterable[int]) -> str:
        if self._texts.by_bytes:
            return super().decode(ids)
        parts = itertools.groupby((int(token) for token in ids), key=self.borders.__contains__)
        texts = [[token for token in part if not self.is_special(token)] for border, part in parts if not border]
        with explained(f"{self.name} cannot make text of its tokens"):
            return "".join(self._files.library.decode(text, skip_special_tokens=False) for text in texts)

    @property
    def closing(self) -> int:  # type: ignore[override]
        return self._texts.closing

    @functools.cached_property
    def _texts(self) -> TokenTexts:
        return token_texts(self._files, hidden=self._files.special.union(self.borders))

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        return _lengths(self._texts.inside, self.vocab_size)

    @functools.cached_property
    def _byte_counts(self) -> ByteCounts:
        inside, opening = self._byte_lengths.copy(), _lengths(self._texts.opening, self.vocab_size)
        inside[self.eos_id] -= self.closing
        if np.array_equal(inside, opening):
            return ByteCounts(inside)
        return ByteCounts(inside, opening, np.isin(np.arange(self.vocab_size), self.borders))

    def byte_counts(self) -> ByteCounts:
        return self._byte_counts

    @functools.cached_property
    def _pieces(self) -> Pieces | None:
        pattern = cutting(self._files.encoder)
        return pattern and Pieces(self._files.encoder, pattern)

    def _encoded(self, texts: Sequence[str], pieces: Pieces | None = None) -> list[np.ndarray]:
        """i32[tokens] of each text, by `pieces` where there are such. Raises DataError where the tokenizer has no token
        for what a text holds."""
        cleaned = [_clean(text) for text in texts]
        with explained(f"{self.name} cannot encode some of the text"):
            if pieces is not None:
                return pieces.encode(cleaned)
            encodings = self._files.encoder.encode_batch_fast(cleaned, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def load_tokenizer(name: str, *, bos: str | None = "", eos: str = "") -> Tokenizer:
    """The tokenizer called `name`: `bytes`, `hnet-bytes`, `bpe-4096`, a path, or a name on the Hugging Face hub.

    A path is a `tokenizer.json` or a folder with one. `bos` and `eos` name the tokens that documents begin and end
    with: "" as the tokenizer's files say, and None as `bos` for none. Raises DataError naming what is missing and the
    choices.
    """
    if name in ("bytes", "hnet-bytes"):
        return _of_bytes(name, bos, eos)
    return JsonTokenizer(name, read_tokenizer(*tokenizer_paths(name), bos, eos))


def _of_bytes(name: str, bos: str | None, eos: str) -> Tokenizer:
    for option, text in (("data.bos", bos), ("data.eos", eos)):
        if text:
            raise DataError(f"{option}={text}: the tokenizer {name} has no tokens with names")
    if name == "bytes":
        return Bytes()
    return _NoBegin() if bos is None else HNetBytes()


def tokenizer_paths(name: str) -> tuple[Path, Path]:
    """The tokenizer.json that a name, a path or a name on the hub means, and where its configuration would be.

    Raises DataError where there is none.
    """
    if name in BUILT_IN:
        path = embedded_file(f"{name}.json")
        return path, path.with_name(CONFIG)
    path = local_path(name, "data.tokenizer")
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path, path.with_name(CONFIG)
    if _looks_like_a_path(name):
        raise DataError(f"data.tokenizer={name}: no file {path}. Give a tokenizer.json, or one of {_choices()}")
    return hub_tokenizer(name)


def _lengths(texts: dict[int, bytes], vocab_size: int) -> np.ndarray:
    """i32[vocab_size] bytes of each token; 0 for those that have no text."""
    lengths = np.zeros(vocab_size, np.int32)
    lengths[list(texts)] = [len(text) for text in texts.values()]
    return lengths


def _choices() -> str:
    return ", ".join(BUILT_IN)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".json", ".model")) or name.count("/") != 1


def _clean(text: str) -> str:
    """`text` without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()
