"""Words by rule: where texts are cut, and which positions of a row of tokens begin a word.

The rule is that of Hierarchical Autoregressive Transformers (HAT; Neitemeier et al. 2025, and the authors' splitter):
the words of Unicode's UAX #29, cut further after punctuation and between lower and upper case, a blank in front.
`Hello, world!` is `Hello,` and ` world!`; `howAreYou` is three words, and so is `how_are_you`. Two or more blanks are a
word. More text changes the last word alone, but for a few characters that can rejoin the word before them: a fraction's
stroke, a narrow blank between digits, combining marks on blanks.

Needs the package `regex` (`pip install 'adaptive-lm[words]'`), which knows Unicode's character classes.
"""

import codecs
import functools
import itertools
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import Tokenizer
from adaptive.errors import DataError

TokenBytes = Callable[[int], bytes]
Marker = Callable[[Batch], Batch]

_REMEMBERED, _LONG = 1 << 16, 64  # pieces of text whose parts are kept, as few make up most of a text; their length


# Kinds of parts of words.
_SPACE, _BLANKS, _PUNCTUATION, _WORD = range(4)
# What joins a group that ends in what; anything else begins a group.
_JOINS = frozenset([(_SPACE, _WORD)] + [(before, _PUNCTUATION) for before in (_SPACE, _WORD, _PUNCTUATION)])


class _Table(NamedTuple):
    """The bytes of tokens, looked up for many at once.

    flat     u8[bytes]     those of all tokens, one after the other
    starts   i64[tokens]   where in `flat` each begins
    lengths  i64[tokens]
    """

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def text(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """u8[bytes] of the tokens `ids` i[tokens], of each its first `lengths` i64[tokens]."""
        if self.lengths.max() <= 1:  # most H-Nets read bytes
            return self.flat[self.starts[ids[lengths > 0]]]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.flat[np.repeat(self.starts[ids], lengths) + within]


def _table(parts: Sequence[bytes]) -> _Table:
    lengths = np.array([len(part) for part in parts], np.int64)
    return _Table(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(lengths) - lengths, lengths)


def word_starts(ids: np.ndarray, segments: np.ndarray, token_bytes: TokenBytes) -> np.ndarray:
    """bool[n]: the tokens of a row with which a word begins, as can be told when they arrive.

    ids          i32[n]
    segments     i32[n]  the document of each token; 0 is padding
    token_bytes  a token's bytes in UTF-8; none for specials, which begin nothing but their document

    A token is marked if the last word of the text up to it (of its document, in this row) begins later than the last
    word up to any token before it, and so is the first token of every document. A character counts once all its bytes
    are there. So no mark depends on what comes later: in `can't` the word `t` is marked at its letter, and a mark that
    later text makes wrong stays. Padding is not marked, but for the first token of a row.
    """
    known, inverse = np.unique(ids, return_inverse=True)
    return _row_starts(inverse[None], segments[None], _table([token_bytes(token) for token in known.tolist()]))[0]


def _row_starts(ids: np.ndarray, segments: np.ndarray, table: _Table) -> np.ndarray:
    """bool[rows, n]: the marks of `word_starts` for rows of tokens that `table` knows."""
    opens = np.ones(ids.shape, bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    marks = opens & (segments > 0)
    marks[:, 0] = True
    lengths = np.where(segments > 0, table.lengths[ids], 0).reshape(-1)
    data = table.text(ids.reshape(-1), lengths)
    if len(data):
        token = np.repeat(np.arange(ids.size), lengths)  # that each byte comes with
        begins = (np.cumsum(lengths) - lengths)[opens.reshape(-1)]
        first = np.zeros(len(data), bool)
        first[begins[begins < len(data)]] = True
        marks.reshape(-1)[token[_begins(data, first)]] = True
    return marks


def batch_marker(boundaries: Literal["none", "words"], tokenizer: Tokenizer) -> Marker:
    """What gives a batch the boundaries of `data.boundaries`. Raises DataError where the package is missing."""
    if boundaries == "none":
        return lambda batch: batch
    _patterns()
    table = functools.cache(lambda: _table([tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]))
    return lambda batch: batch._replace(boundaries=_row_starts(batch.tokens, batch.segment_ids, table()))


def row_marker(boundaries: Literal["none", "words"], tokenizer: Tokenizer) -> Marker:
    """What gives a row (a Batch without the batch axis) the boundaries of `data.boundaries`.

    Raises DataError where the package is missing.
    """
    if boundaries == "none":
        return lambda row: row
    _patterns()
    token_bytes = tokenizer.token_bytes
    return lambda row: row._replace(boundaries=word_starts(row.tokens, row.segment_ids, token_bytes))


class WordMarker:
    """The marks of `word_starts` for tokens of one document that arrive one by one."""

    def __init__(self, token_bytes: TokenBytes):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._words = _LastWord()
        self._first = True

    def push(self, token: int) -> bool:
        """Whether a word begins with this token."""
        begins, self._first = self._first, False
        for character in self._decoder.decode(self._token_bytes(int(token))):
            begins |= self._words.push(character)
        return begins


class _LastWord:
    """Where the last word of a growing text begins. Only the end of the text that can still change is kept."""

    def __init__(self) -> None:
        self._text = ""
        self._latest = -1  # the latest beginning so far, in what is kept

    def push(self, character: str) -> bool:
        """Whether the last word now begins later than ever before."""
        self._text += character
        pieces = _pieces(self._text)
        starts = _starts(pieces)
        begins = starts[-1] > self._latest
        self._latest = max(self._latest, starts[-1])
        self._forget(pieces, starts)
        return begins

    def _forget(self, pieces: list[str], starts: list[int]) -> None:
        """Drops what is before the last word that stays where it is: one at a piece that another piece follows."""
        fixed = set(itertools.accumulate(map(len, pieces[:-2]), initial=0))
        cut = max(start for start in starts if start in fixed)
        self._text = self._text[cut:]
        self._latest -= cut


# Kinds of ASCII characters. A blank behind another one is of its own kind, so that what follows knows of both.
_OTHER, _LOWER, _UPPER, _DIGIT, _MARK, _BLANK, _WHITE, _RETURN, _NEWLINE, _BLANK_AGAIN, _BEYOND = range(11)


def _ascii_kinds() -> np.ndarray:
    """i8[256]: the kind of every byte."""
    kinds = np.full(256, _BEYOND, np.uint8)
    kinds[:128] = _OTHER
    for kind, characters in (
        (_LOWER, string.ascii_lowercase),
        (_UPPER, string.ascii_uppercase),
        (_DIGIT, string.digits),
        (_MARK, "!\"#%&'()*,-./:;?@[\\]_{}"),
        (_BLANK, " "),
        (_WHITE, "\t\v\f"),
        (_RETURN, "\r"),
        (_NEWLINE, "\n"),
    ):
        kinds[list(characters.encode())] = kind
    return kinds


def _ascii_rule() -> np.ndarray:
    """bool[256]: whether a word begins with a character of kind k behind one of kind j, at 16 j + k."""
    rule = np.ones((16, 16), bool)
    of_words = (_LOWER, _UPPER, _DIGIT)
    for before in of_words:
        rule[before, of_words] = False
    rule[_LOWER, _UPPER] = True
    rule[_BLANK, (_OTHER, *of_words)] = False
    rule[(_OTHER, *of_words, _MARK, _BLANK), _MARK] = False
    rule[(_BLANK, _BLANK_AGAIN), _BLANK_AGAIN] = False
    rule[_RETURN, _NEWLINE] = False
    return rule.reshape(-1)


_KINDS, _RULE = _ascii_kinds(), _ascii_rule()


def _begins(data: np.ndarray, first: np.ndarray) -> np.ndarray:
    """i64[marks] ascending: the bytes of `data` u8[n] with which the marked characters are complete; first: bool[n]
    where documents begin.

    Of ASCII the rule needs the character before alone, so it is looked up for all bytes at once. What else there is is
    cut out, from a blank behind ASCII to another, where whatever is before and behind makes no difference.
    """
    kinds = _KINDS[data]
    blank = kinds == _BLANK
    again = np.zeros(len(data), bool)
    again[1:] = blank[1:] & blank[:-1] & ~first[1:]
    kinds[again] = _BLANK_AGAIN
    before = np.empty_like(kinds)
    before[0], before[1:] = _OTHER, kinds[:-1]
    begins = _RULE[before << 4 | kinds] | first
    beyond = kinds == _BEYOND
    if not beyond.any():
        return np.flatnonzero(begins)
    cuts = np.flatnonzero(first | ((kinds == _BLANK) & (before != _BEYOND)))
    ends = np.append(cuts[1:], len(data))
    touched = np.logical_or.reduceat(beyond, cuts)
    # Neighbours are looked through together, but for those of two documents.
    alone = touched & np.concatenate([[True], ~touched[:-1] | first[cuts[1:]]])
    last = touched & np.concatenate([~touched[1:] | first[cuts[1:]], [True]])
    for start, stop in zip(cuts[alone].tolist(), ends[last].tolist(), strict=True):
        begins[start:stop] = False
        begins[start + _arrivals(data[start:stop].tobytes())] = True
    return np.flatnonzero(begins)


def _arrivals(data: bytes) -> np.ndarray:
    """i64[marks] ascending: the bytes with which the marked characters are complete."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        text, last = _repaired(data)
    else:
        last = _last_bytes(text)
    return last[_marked(text)]


def _marked(text: str) -> list[int]:
    """The characters with which a word begins, as can be told when they arrive."""
    if not _patterns().unsettled.search(text):
        return _starts(_pieces(text))
    words = _LastWord()
    return [at for at, character in enumerate(text) if words.push(character)]


def _last_bytes(text: str) -> np.ndarray:
    """i64[characters]: the index of the last byte of each in UTF-8."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)) - 1


def _repaired(data: bytes) -> tuple[str, np.ndarray]:
    """Text with U+FFFD for bytes that are no UTF-8, and i64[characters] the byte that completed each."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(data[i : i + 1]) for i in range(len(data))]
    return "".join(parts), np.repeat(np.arange(len(data)), [len(part) for part in parts])


def _pieces(text: str) -> list[str]:
    """The words of UAX #29."""
    return _patterns().piece.findall(text)


def _starts(pieces: Iterable[str]) -> list[int]:
    """Where in the text each word begins."""
    starts, at, before = [], 0, None
    for piece in pieces:
        for length, kind in _known_parts(piece) if len(piece) <= _LONG else _parts(piece):
            if (before, kind) not in _JOINS:
                starts.append(at)
            at += length
            before = kind
    return starts


def _parts(piece: str) -> tuple[tuple[int, int], ...]:
    """Length and kind of the parts of a word of UAX #29."""
    patterns = _patterns()
    parts = []
    for part in patterns.cut.split(piece):
        if part == " ":
            kind = _SPACE
        elif patterns.blanks.fullmatch(part):
            kind = _BLANKS
        elif patterns.punctuation.fullmatch(part):
            kind = _PUNCTUATION
        else:
            kind = _WORD
        if part:
            parts.append((len(part), kind))
    return tuple(parts)


_known_parts = functools.lru_cache(_REMEMBERED)(_parts)


class _Patterns(NamedTuple):
    """What the text is looked through for.

    piece        a word of UAX #29
    cut          the places in it where HAT's rule cuts further
    punctuation  one such character
    blanks       white space
    unsettled    what the next character can make part of a word that began earlier
    """

    piece: Any
    cut: Any
    punctuation: Any
    blanks: Any
    unsettled: Any


@functools.cache
def _patterns() -> _Patterns:
    """UAX #29 is written out: the library's own word boundaries (\\b with the flag `w`) go wrong after a single
    regional indicator and after combining marks that begin a text. Rule WB7a is left out, as HAT's rule cuts there.
    """
    try:
        import regex
    except ImportError:
        raise DataError("splitting text into words needs a package: pip install 'adaptive-lm[words]'") from None

    of = lambda *names: "[" + "".join(rf"\p{{Word_Break={name}}}" for name in names) + "]"  # noqa: E731
    extending = of("Extend", "Format", "ZWJ")
    extended = f"{extending}*+"  # rule WB4
    letter, hebrew, digit = of("ALetter", "Hebrew_Letter"), of("Hebrew_Letter"), of("Numeric")
    katakana, connector = of("Katakana"), of("ExtendNumLet")
    # Rules WB5 to WB12: letters and digits, and single marks between letters or between digits.
    mark = f"{of('MidLetter', 'MidNumLet', 'Single_Quote')}{extended}(?={letter})"
    quote = f'(?<={hebrew}{extending}*)"{extended}(?={hebrew})'
    point = f"{of('MidNum', 'MidNumLet', 'Single_Quote')}{extended}(?={digit})"
    letters = f"(?:{letter}{extended})++(?:{mark}|{quote})?+"
    digits = f"(?:{digit}{extended})++(?:{point})?+"
    word = f"(?:(?:{letters}|{digits})++|(?:{katakana}{extended})++)"
    # Rules WB13a and WB13b: connectors join words of all three kinds.
    run = f"(?:{word}|(?={connector}))(?:(?:{connector}{extended})++{word}?+)*+"
    flag = f"{of('Regional_Indicator')}{extended}"
    unit = rf"(?:{run}|{of('WSegSpace')}++{extended}|\r\n|{of('CR', 'LF', 'Newline')}|{flag}(?:{flag})?+|.{extended})"
    # Rule WB3c: an emoji after a joiner.
    joined = rf"(?<=\u200d)(?=\p{{Extended_Pictographic}}){unit}"
    marks = of("MidLetter", "MidNumLet", "MidNum", "ExtendNumLet")
    # Most of many texts: what stands for itself where the next character is ASCII, so that nothing can extend it.
    ascii_word = r"[A-Za-z]++(?=[\x00-\x7f--A-Za-z0-9_'.:])"
    ascii_mark = r"[ !-/:-@\[-\^`{-~](?=[\x21-\x7f\n])"
    return _Patterns(
        piece=regex.compile(f"{ascii_word}|{ascii_mark}|{unit}(?:{joined})*+", regex.DOTALL | regex.V1),
        cut=regex.compile(r"(?<=\p{P})|(?<=\p{Ll})(?=\p{Lu})", regex.V1),
        punctuation=regex.compile(r"\p{P}"),
        blanks=regex.compile(r"\p{White_Space}+"),
        # A mark between letters or digits that is no punctuation, which would end a word; extended blanks are a word.
        unsettled=regex.compile(rf"[[{marks}]--\p{{P}}]|\p{{White_Space}}{extending}", regex.V1),
    )
