"""Text of tokens as they come, each token with the text that it made."""

from collections.abc import Sequence
from typing import NamedTuple

from adaptive.data.tokenizers import Tokenizer
from adaptive.inference.requests import Made
from adaptive.inference.stops import Part, Stops


class Token(NamedTuple):
    """text: what could be shown once it had come, "" where a character was still incomplete; offset: characters of the
    continuation before it."""

    made: Made
    text: str
    offset: int


class Piece(NamedTuple):
    """Some text, which is that of its tokens one after another; without tokens where none is left that made it."""

    text: str = ""
    tokens: tuple[Token, ...] = ()


class Texts:
    """Makes text of one continuation: what may still become a stop text waits, and so do bytes of half a character.

    prompt  i32[n]: ids before it, whose last character it may complete
    stops   the first of them ends it, and is not part of it; tokens that begin in a stop text are left out
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._stream = tokenizer.stream()
        for token in prompt:
            self._stream.push(token)
        self._stops = Stops(stops)
        self._waiting: list[Token] = []
        self._seen = self._sure = 0  # characters that came, and those of them that no stop text can take back

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended it."""
        return self._stops.reached

    def push(self, made: Made) -> Piece:
        """What is surely part of it now."""
        text = self._stream.push(made.token)
        self._waiting.append(Token(made, text, self._seen))
        self._read(text)
        if self.stopped:
            return self._last()
        whole = [i for i, t in enumerate(self._waiting) if t.text and t.offset + len(t.text) <= self._sure]
        return self._give(whole[-1] + 1 if whole else 0)

    def finish(self) -> Piece:
        """The rest, as no more tokens come: U+FFFD where its last character never became whole."""
        if self.stopped:
            return Piece()
        rest = self._stream.finish()
        self._read(rest)
        self._sure += sum(len(part.text) for part in self._stops.finish())
        if self.stopped:
            return self._last()
        if not self._waiting:
            return Piece(rest)
        last = self._waiting[-1]
        self._waiting[-1] = last._replace(text=last.text + rest)
        return self._give(len(self._waiting))

    def _read(self, text: str) -> None:
        self._seen += len(text)
        self._sure += sum(len(part.text) for part in self._stops.push(Part("", text)))

    def _give(self, count: int) -> Piece:
        given, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return Piece("".join(token.text for token in given), given)

    def _last(self) -> Piece:
        """What stands before the stop text."""
        self._waiting = [
            t._replace(text=t.text[: self._sure - t.offset]) for t in self._waiting if t.offset < self._sure
        ]
        return self._give(len(self._waiting))
