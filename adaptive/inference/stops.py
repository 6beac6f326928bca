"""Where a text ends that is made piece by piece: before the first of several texts that are to stop it."""

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Some text, and what is put before it when it is shown."""

    mark: str
    text: str


class Stops:
    """Takes a text in parts and gives them back, those last that could still become a stop text.

    texts   none of them empty; what comes from the first of them on is dropped
    """

    def __init__(self, texts: Sequence[str] = ()):
        assert all(texts)
        self._texts = tuple(texts)
        self._held: list[Part] = []  # of one character each
        self.reached = False

    def push(self, part: Part) -> list[Part]:
        """What is surely part of the text, after `part`."""
        if self.reached:
            return []
        if not self._texts:
            return [part]
        self._held += [Part(part.mark * (i == 0), char) for i, char in enumerate(part.text)]
        text = "".join(char for _, char in self._held)
        found = [at for stop in self._texts if (at := text.find(stop)) >= 0]
        if found:
            self.reached = True
            return self._give(min(found))
        return self._give(len(text) - max(_overlap(text, stop) for stop in self._texts))

    def finish(self) -> list[Part]:
        """The rest, as nothing follows that could make it a stop text."""
        return [] if self.reached else self._give(len(self._held))

    def _give(self, count: int) -> list[Part]:
        given, self._held = self._held[:count], self._held[count:]
        return given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
