"""Dotted paths into trees of frozen dataclasses: listing leaves, setting them from text, reading them from JSON.

Leaves are int, float, bool, str, Literal, tuple[float, ...], tuple[int, ...], tuple[str, ...] and `kind | None`.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, TypeGuard, TypeVar

from adaptive.errors import RecipeError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LARGEST_INT = 2**63 - 1


def leaf_kinds(cls: type, above: str = "") -> dict[str, Any]:
    """Dotted path -> annotated type of every leaf below the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    kinds: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        path, kind = f"{above}{field.name}", hints[field.name]
        kinds |= leaf_kinds(kind, f"{path}.") if _is_dataclass(kind) else {path: kind}
    return kinds


def leaf_values(node: Any, above: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf below the dataclass instance `node`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        path, value = f"{above}{field.name}", getattr(node, field.name)
        values |= leaf_values(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: value}
    return values


def with_leaf(node: T, path: str, value: Any) -> T:
    """A copy of the dataclass instance `node` with the leaf at dotted `path` replaced."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(node, **{head: with_leaf(getattr(node, head), rest, value) if rest else value})  # type: ignore[type-var]


def expected(kind: Any) -> str:
    """What a leaf of this type takes, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return {int: "whole numbers", float: "numbers", str: "names"}[args[0]] + " separated by commas, or nothing"
    if origin in (types.UnionType, typing.Union):
        return f"{expected(_inner(kind))}, or none"
    return _WORDS[kind]


def parse(kind: Any, text: str, *, where: str) -> Any:
    """The value of type `kind` that `text` spells; whole numbers may be written 1e9. Raises RecipeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = RecipeError(f"{where}={text}: expected {expected(kind)}{_hint(kind, text)}")
    if origin in (types.UnionType, typing.Union):
        try:
            return None if text == "none" else parse(_inner(kind), text, where=where)
        except RecipeError:
            raise wrong from None
    if origin is typing.Literal:
        spelled = {str(value): value for value in args}
        if text not in spelled:
            raise wrong
        return spelled[text]
    if origin is tuple:
        parts = [] if text in ("", "()") else [part.strip() for part in text.split(",")]
        try:
            return tuple(parse(args[0], part, where=where) for part in parts)
        except RecipeError:
            raise wrong from None
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise wrong
        return text == "true"
    number = _number(text)
    if number is None or (kind is int and not _whole(number)):
        raise wrong
    value = kind(number)
    if kind is float and not math.isfinite(value):
        raise wrong
    return value


def read(kind: Any, value: Any, *, where: str, fill: bool = False) -> Any:
    """`value` as JSON gave it, checked to be of type `kind`, lists as tuples, dataclasses from objects.

    Raises RecipeError for a wrong type and for keys that are unknown or missing; with `fill`, missing ones have their
    default where there is one.
    """
    if _is_dataclass(kind):
        return _read_dataclass(kind, value, where, fill)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else read(_inner(kind), value, where=where)
    if origin is tuple and isinstance(value, list):
        return tuple(read(args[0], item, where=where) for item in value)
    if origin is typing.Literal and value in args:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise RecipeError(f"{where} is {value!r}: expected {expected(kind)}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The dotted names most like `name`, best first: spelt alike, ending alike, or abbreviated so (lr)."""
    tail = name.rpartition(".")[2]

    def likeness(path: str) -> float:
        own = path.rpartition(".")[2]
        initials = "".join(word[0] for word in own.split("_"))
        ends = 1.0 if tail == initials and len(tail) > 1 else _ratio(tail, own)
        return max(_ratio(name, path), ends) + 0.1 * _ratio(name, path)

    ranked = sorted(((likeness(path), path) for path in known), key=lambda pair: (-pair[0], pair[1]))
    return [path for score, path in ranked[:count] if score > 0.65]


def _read_dataclass(cls: type, value: Any, where: str, fill: bool) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is {value!r}: expected an object with the fields of {cls.__name__}")
    kinds = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    for key in value:
        if key not in names:
            near = ", ".join(nearest(key, names) or names)
            raise RecipeError(f"{where}.{key} does not exist; nearest: {near}")
    missing = [field.name for field in fields if field.name not in value and not (fill and _has_default(field))]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}")
    given = [name for name in names if name in value]
    return cls(**{name: read(kinds[name], value[name], where=f"{where}.{name}", fill=fill) for name in given})


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_dataclass(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _inner(kind: Any) -> Any:
    """The type K of `K | None`."""
    return next(arg for arg in typing.get_args(kind) if arg is not type(None))


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _whole(number: Decimal) -> bool:
    # The exponent is looked at first: int(Decimal("1e999999999")) would fill the memory.
    return number.adjusted() < 19 and number == number.to_integral_value() and abs(number) <= _LARGEST_INT


def _hint(kind: Any, text: str) -> str:
    if kind is int and _number(text) is not None:
        return " (not a fraction, and below 2^63)"
    if typing.get_origin(kind) is typing.Literal:
        near = difflib.get_close_matches(text, map(str, typing.get_args(kind)), n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if kind is float and re.fullmatch(r"-?\d+(\.\d+)?/\d+", text):
        return "; write the fraction as a decimal"
    return ""


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
