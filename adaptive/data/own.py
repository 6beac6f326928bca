"""Documents that a function of the user's gives."""

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from adaptive import own
from adaptive.data.batch import Group
from adaptive.errors import DataError

_GROUP = 1000
_PARTS = 8  # asked of a function that gives its documents in parts


class OwnDocuments:
    """What a function yields, one text per document; see `batch.DocumentStream`.

    name  MODULE:FUNCTION; every call of it must give the same documents in the same order. It takes no arguments, or
          `part` and `parts`: then it gives the documents of part `part` of `parts` alone

    Raises RecipeError for what cannot be imported, DataError for what is no function or gives something else than text.
    """

    def __init__(self, name: str):
        self.name = name
        self._function = own.named(name, "data.paths")
        if not callable(self._function):
            raise DataError(f"data.paths={name} is no function, but {type(self._function).__name__}")
        self._options = {"part": 0, "parts": 1} if _gives_parts(self._function) else {}

    def groups(self, position: dict | None) -> Iterator[Group]:
        seen = position["documents"] if position else 0
        with own.told(self.name):
            documents = itertools.islice(iter(self._function(**self._options)), seen, None)
        while texts := self._read(documents, seen):
            yield Group({"documents": seen}, seen, texts)
            seen += len(texts)

    def parts(self) -> list["OwnDocuments"]:
        if not self._options:
            return [self]
        found = [copy.copy(self) for _ in range(_PARTS)]
        for part, one in enumerate(found):
            one._options = {"part": part, "parts": _PARTS}
        return found

    def _read(self, documents: Iterator[Any], seen: int) -> list[str]:
        with own.told(self.name):
            texts = list(itertools.islice(documents, _GROUP))
        for i, text in enumerate(texts, seen):
            if not isinstance(text, str):
                raise DataError(f"{self.name}: document {i} is of type {type(text).__name__}, expected text")
        return texts


def _gives_parts(function: Any) -> bool:
    try:
        return {"part", "parts"} <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some that are built in have none
        return False
