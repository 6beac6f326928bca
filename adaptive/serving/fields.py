"""The fields of a request's JSON, each checked as it is read."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive.serving.errors import Refused
from adaptive.settings import parse_json


def parsed(content: bytes) -> "Fields":
    """Raises Refused for what is no JSON object."""
    try:
        tree = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_json") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON that can be used: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refused(400, f"the body must be a JSON object, not {_kind(tree)}", code="invalid_json")
    return Fields(tree)


class Fields:
    """Fields of an object, which null leaves out; each is asked for once, and `finish` refuses those that nobody did.

    at  dotted path of the object; "": the body
    """

    def __init__(self, tree: Mapping[str, Any], at: str = ""):
        self._tree = {name: value for name, value in tree.items() if value is not None}
        self._at = f"{at}." if at else ""
        self._known: list[str] = []

    def any(self, name: str) -> Any:
        """As it stands; None where it is absent."""
        self._known.append(name)
        return self._tree.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, f"must be a text, not {_kind(value)}")
        return clean(value)

    def flag(self, name: str) -> bool:
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def integer(self, name: str, default: int, *, least: int, most: int) -> int:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"must be a whole number, not {_kind(value)}")
        if not least <= value <= most:
            raise self.wrong(name, f"must be from {least} to {most}, not {_shown(value)}")
        return value

    def real(self, name: str, default: float, *, least: float, most: float, above: float | None = None) -> float:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"must be a number, not {_kind(value)}")
        if not least <= value <= most or value == above:
            low = f"from {least:g}" if above is None else f"above {above:g} and"
            raise self.wrong(name, f"must be {low} to {most:g}, not {_shown(value)}")
        return float(value)

    def texts(self, name: str, *, most: int) -> tuple[str, ...]:
        """One text or a list of them, none of them empty."""
        value = self.any(name)
        given = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise self.wrong(name, "must be a text or a list of texts")
        if len(given) > most:
            raise self.wrong(name, f"may have {most} texts at most, not {len(given)}")
        if "" in given:
            raise self.wrong(name, "must not be empty")
        return tuple(clean(each) for each in given)

    def inner(self, name: str) -> "Fields":
        """The object of this name; an empty one where it is absent."""
        value = self.any(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, not {_kind(value)}")
        return Fields(value or {}, f"{self._at}{name}")

    def only(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """Refuses a field with any value but those that change nothing."""
        value = self.any(name)
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            raise Refused(400, f"'{self._at}{name}': {why}", param=self._at + name, code="unsupported_parameter")

    def finish(self) -> None:
        for name in self._tree:
            if name not in self._known:
                near = difflib.get_close_matches(name[:100], self._known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                path = f"{self._at}{clean(name[:100])}"
                raise Refused(400, f"'{path}' is no field of this request{hint}", param=path, code="unknown_parameter")

    def wrong(self, name: str, what: str) -> Refused:
        return Refused(400, f"'{self._at}{name}' {what}", param=self._at + name, code="invalid_value")


def clean(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()


def _shown(value: float) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
