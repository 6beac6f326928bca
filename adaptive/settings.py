"""Settings are a tree of frozen dataclasses: what a node may be, its leaves by dotted path, and reading them from text.

A leaf is an int, float, bool, str, Literal, a tuple of numbers or names, or `kind | None`. A node is a dataclass, or a
tuple of them, whose places are numbers in a path (`model.body.stack.blocks.0.repeat`). Where a node can be several
things it is a `Member` of a door, a package with one file per member; the file's name is the member's kind. In JSON
such a node has a "kind"; on the command line the node's own path takes one (`model.body.depth=token_choice`). A part
that lies elsewhere is named MODULE:NAME in its place.
"""

import dataclasses
import difflib
import functools
import importlib
import json
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, TypeGuard, TypeVar

from adaptive import own
from adaptive.errors import RecipeError

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LARGEST_INT = 2**63 - 1
_ITEM = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*|([^,]*)),')
_SHOWN = 60  # characters of a value in a message


class Member:
    """Base of the settings of everything behind one door. A door's own base class names its package; a member's file in
    that package has a dataclass `Settings` below that base.

    before  the kind that recipes saved without one had, as there was no other; empty: none were
    """

    door: ClassVar[str]
    before: ClassVar[str] = ""

    @classmethod
    def kind(cls) -> str:
        """The member's name: that of its file; MODULE:NAME of a part that is not ours."""
        package, _, name = cls.__module__.rpartition(".")
        return name if package == cls.door else f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def kinds(cls) -> list[str]:
        """Names of all members behind this door, sorted."""
        return list(_names(cls.door))

    @classmethod
    def member(cls, kind: str, *, where: str = "kind") -> type:
        """The settings of the member `kind`, or of a part of the user's own that is named MODULE:NAME.

        Raises RecipeError for an unknown one, with the nearest, and for what cannot be imported or is no such part.
        """
        if ":" in kind:
            return cls._own(kind, where)
        if kind not in cls.kinds():
            near = nearest(kind, cls.kinds()) or cls.kinds()
            raise RecipeError(f"{where}={kind}: there is no such thing; nearest: {', '.join(near)}")
        return importlib.import_module(f"{cls.door}.{kind}").Settings

    @classmethod
    def _own(cls, kind: str, where: str) -> type:
        found = own.named(kind, where)
        if not (isinstance(found, type) and issubclass(found, Member) and getattr(found, "door", "") == cls.door):
            base = next(f"{base.__module__}.{base.__name__}" for base in cls.__mro__ if "door" in vars(base))
            raise RecipeError(f"{where}={kind} is no part for this place: make it a subclass of {base}")
        if not dataclasses.is_dataclass(found):
            raise RecipeError(f"{where}={kind} must be a frozen dataclass: its fields are the part's settings")
        return found


@functools.cache
def _names(package: str) -> tuple[str, ...]:
    files = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    return tuple(sorted(name for name in files if hasattr(importlib.import_module(f"{package}.{name}"), "Settings")))


def ranged(
    default: Any, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Any:
    """A field with a default whose value must lie from `least` to `most`, above `above` and below `below`."""
    return dataclasses.field(default=default, metadata={"range": (least, most, above, below)})


def since(default: Any, *, before: Any, **limits: float) -> Any:
    """A field with a default that recipes saved before there was such a field had as `before`; limits: of `ranged`."""
    limited = dict(ranged(default, **limits).metadata) if limits else {}
    return dataclasses.field(default=default, metadata={"before": before, **limited})


def spelt(default: Any, *, once: dict[bool, Any]) -> Any:
    """A field with a default whose value was a truth in recipes saved earlier; once: what that is now."""
    return dataclasses.field(default=default, metadata={"once": once})


# The tree


def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, resolved."""
    return _hints(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fields(node: Any) -> Iterable[tuple[dataclasses.Field, Any, Any]]:
    """(field, type, value) of every field of a dataclass instance."""
    kinds = hints(type(node))
    return [(f, kinds[f.name], getattr(node, f.name)) for f in dataclasses.fields(node)]


def leaf_kinds(node: Any, above: str = "") -> dict[str, Any]:
    """Dotted path -> type of every leaf below the dataclass instance `node`; of a member's node, the door."""
    return {path: kind for path, kind, _ in _leaves(node, above)}


def leaf_values(node: Any, above: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf below the dataclass instance `node`; of a member's node, its kind."""
    return {path: value for path, _, value in _leaves(node, above)}


def _leaves(node: Any, above: str) -> Iterable[tuple[str, Any, Any]]:
    for field, kind, value in fields(node):
        path = f"{above}{field.name}"
        if is_choice(kind):
            yield path, kind, None if value is None else value.kind() if isinstance(value, Member) else True
            if value is not None:
                yield from _leaves(value, f"{path}.")
        elif is_nodes(kind):
            for i, item in enumerate(value):
                yield from _leaves(item, f"{path}.{i}.")
        elif dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, kind, value


def nodes(node: Any, at: str) -> Iterable[tuple[str, Any]]:
    """(dotted path, node) of the dataclass instance `node`, whose own path is `at`, and of every node below it."""
    yield at, node
    for field, kind, value in fields(node):
        if is_nodes(kind):
            for i, item in enumerate(value):
                yield from nodes(item, f"{at}.{field.name}.{i}")
        elif dataclasses.is_dataclass(value):
            yield from nodes(value, f"{at}.{field.name}")


def without_effect(node: Any) -> dict[str, str]:
    """Fields of the dataclass instance `node` that have another value than their default and mean nothing beside the
    others, and why: what its method `unread` says, where it has one."""
    why = node.unread() if hasattr(node, "unread") else {}
    return {name: reason for name, reason in why.items() if is_given(node, name)}


def is_given(node: Any, name: str) -> bool:
    """Whether the field of a dataclass instance has another value than its default."""
    field = next(f for f in dataclasses.fields(node) if f.name == name)
    return bool(getattr(node, name) != field.default)


def with_leaf(node: Any, path: str, value: Any) -> Any:
    """A copy of the dataclass instance `node` with the leaf at dotted `path` replaced."""
    head, _, rest = path.partition(".")
    if isinstance(node, tuple):
        i = int(head)
        return (*node[:i], with_leaf(node[i], rest, value), *node[i + 1 :])
    return dataclasses.replace(node, **{head: with_leaf(getattr(node, head), rest, value) if rest else value})


def check_ranges(node: Any, above: str = "") -> None:
    """Raises RecipeError for the first leaf below `node` that is no finite number of 64 bits, or lies outside the range
    that its field declares."""
    for field, kind, value in fields(node):
        path = f"{above}{field.name}"
        if is_nodes(kind):
            for i, item in enumerate(value):
                check_ranges(item, f"{path}.{i}.")
        elif dataclasses.is_dataclass(value):
            check_ranges(value, f"{path}.")
        else:
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int | float) and not _usable(item):
                    raise RecipeError(f"{path}={_short(show(value))}: must be finite, whole numbers below 2^63")
                if "range" in field.metadata:
                    _check_range(path, item, value, *field.metadata["range"])


def _check_range(path: str, item: Any, value: Any, least: float, most: float, above: float, below: float) -> None:
    if item is None or (least <= item <= most and above < item < below):
        return
    exact = lambda limit: f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"  # noqa: E731
    low = f"at least {exact(least)}" if least > -math.inf else f"above {exact(above)}" if above > -math.inf else ""
    high = f"at most {exact(most)}" if most < math.inf else f"below {exact(below)}" if below < math.inf else ""
    raise RecipeError(f"{path}={show(value)}: must be {' and '.join(filter(None, (low, high)))}")


# JSON


def parse_json(text: str) -> Any:
    """What a text of JSON says. Raises ValueError, which begins with the place, where that cannot be told: other text,
    nesting beyond what Python follows, numbers that are not finite or have too many digits."""
    try:
        return json.loads(text, parse_constant=_no_number, parse_int=_json_int, parse_float=_json_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("somewhere: nested too deeply") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"somewhere: {_short(text)} is no number that JSON or a setting may have")


def _json_int(text: str) -> int:
    return int(text) if len(text) <= 300 else _no_number(text)


def _json_float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def to_tree(node: Any) -> Any:
    """The node as JSON holds it; `read` gives back an equal one."""
    if isinstance(node, tuple):
        return [to_tree(item) for item in node]
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    kind = {"kind": node.kind()} if isinstance(node, Member) else {}
    return kind | {field.name: to_tree(value) for field, _, value in fields(node)}


def read(kind: Any, value: Any, *, where: str) -> Any:
    """`value` as JSON gave it, checked to be of type `kind`, lists as tuples, dataclasses from objects.

    Raises RecipeError for a wrong type and for keys that are unknown or missing.
    """
    if is_choice(kind) and value is None and _optional(kind):
        return None
    door = _node(kind)
    if door is not None:
        return _read_dataclass(door, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else read(_inner(kind), value, where=where)
    if origin is tuple and isinstance(value, list):
        return tuple(read(args[0], item, where=f"{where}.{i}") for i, item in enumerate(value))
    if origin is typing.Literal and value in args:
        return value
    if kind in (int, float) and type(value) in (int, kind):
        number = float(value) if kind is float and abs(value) < 1e300 else value
        if _usable(number):
            return number
    elif origin is None and type(value) is kind:
        return value
    raise RecipeError(f"{where} is {_short(repr(value))}: expected {expected(kind)}{_hint(kind, str(value))}")


def _read_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is {_short(repr(value))}: expected an object with the fields of {cls.__name__}")
    if issubclass(cls, Member):
        value = dict(value)
        kind = value.pop("kind", cls.before or None)
        if not isinstance(kind, str):
            raise RecipeError(f'{where} lacks its "kind": one of {", ".join(cls.kinds())}')
        cls = cls.member(kind, where=where)
    kinds, names = hints(cls), [field.name for field in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            near = ", ".join(nearest(key, names) or names)
            raise RecipeError(f"{where}.{key} does not exist; nearest: {near}")
    value = {f.name: f.metadata["before"] for f in dataclasses.fields(cls) if "before" in f.metadata} | value
    once = {f.name: f.metadata["once"] for f in dataclasses.fields(cls) if "once" in f.metadata}
    value |= {name: now[value[name]] for name, now in once.items() if isinstance(value.get(name), bool)}
    missing = [name for name in names if name not in value]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}")
    return cls(**{name: read(kinds[name], value[name], where=f"{where}.{name}") for name in names})


# Text


def show(value: Any) -> str:
    """A leaf's value as an override spells it; text that is empty or ends in a space in quotes."""
    if isinstance(value, tuple):
        return ",".join(map(_show_item, value)) or "()"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value and value == value.strip() else f'"{value}"'
    return "none" if value is None else str(value)


def _show_item(value: Any) -> str:
    """As `show`, between commas: text that holds one, or begins like a quote, in quotes."""
    quoted = isinstance(value, str) and ("," in value or value.startswith('"') or value != value.strip() or not value)
    return '"' + value.replace('"', '""') + '"' if quoted else show(value)


def _items(text: str) -> list[str]:
    """What stands between the commas; in double quotes a comma is part of it, and a quote is written twice."""
    found = _ITEM.finditer(text + ",")
    return [item[2].strip() if item[1] is None else item[1].replace('""', '"') for item in found]


def expected(kind: Any) -> str:
    """What a leaf of this type takes, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    door = _node(kind)
    if door is not None:
        names = door.kinds() if issubclass(door, Member) else ["true"]
        return f"one of {', '.join([*names, *(['none'] * _optional(kind))])}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return {int: "whole numbers", float: "numbers", str: "names"}[args[0]] + " separated by commas, or nothing"
    if origin in (types.UnionType, typing.Union):
        return f"{expected(_inner(kind))}, or none"
    return _WORDS[kind]


def parse(kind: Any, text: str, *, where: str) -> Any:
    """The value of type `kind` that `text` spells; whole numbers may be written 1e9, a member is its kind with the
    defaults. Raises RecipeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    door = _node(kind)
    if door is not None:
        return _parse_node(kind, door, text, where)
    wrong = RecipeError(f"{where}={_short(text)}: expected {expected(kind)}{_hint(kind, text)}")
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
        parts = [] if text in ("", "()") else _items(text)
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


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending; for a message that lists what would fit."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The dotted names most like `name`, best first: spelt alike, ending alike, or abbreviated so (lr)."""
    tail = name.rpartition(".")[2]

    def likeness(path: str) -> float:
        own = path.rpartition(".")[2]
        initials = "".join(word[0] for word in own.split("_") if word)
        ends = 1.0 if tail == initials and len(tail) > 1 else _ratio(tail, own)
        return max(_ratio(name, path), ends) + 0.1 * _ratio(name, path)

    ranked = sorted(((likeness(path), path) for path in known), key=lambda pair: (-pair[0], pair[1]))
    return [path for score, path in ranked[:count] if score > 0.65]


# Types


def is_choice(kind: Any) -> bool:
    """Whether a field of this type takes a member of a door, or a node that may be none."""
    node = _node(kind)
    return node is not None and (issubclass(node, Member) or _optional(kind))


def is_nodes(kind: Any) -> bool:
    """Whether a field of this type holds a tuple of nodes."""
    return typing.get_origin(kind) is tuple and is_dataclass_or_door(typing.get_args(kind)[0])


def is_dataclass_or_door(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Member))


def _node(kind: Any) -> type | None:
    inner = _inner(kind) if _optional(kind) else kind
    return inner if is_dataclass_or_door(inner) else None


def _optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union) and type(None) in typing.get_args(kind)


def _parse_node(kind: Any, node: type, text: str, where: str) -> Any:
    if text == "none" and _optional(kind):
        return None
    if not issubclass(node, Member):
        if text != "true":
            raise RecipeError(f"{where}={text}: expected true for its defaults, or none")
        return node()
    if text not in node.kinds() and ":" not in text:
        near = nearest(text, node.kinds())
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"{where}={text}: expected {expected(kind)}{hint}")
    member = node.member(text, where=where)
    try:
        return member()
    except TypeError as error:  # of the user's own: ours have a default for every field
        raise RecipeError(f"{where}={text}: every field of {member.__name__} needs a default ({error})") from None


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


def _usable(number: float) -> bool:
    """Whether a number is finite and, if it is whole, has 64 bits."""
    return math.isfinite(number) if isinstance(number, float) else abs(number) <= _LARGEST_INT


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _hint(kind: Any, text: str) -> str:
    if kind is int and _number(text) is not None:
        return " (not a fraction, and below 2^63)"
    if kind is float and text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return " that is finite"
    if typing.get_origin(kind) is typing.Literal:
        near = difflib.get_close_matches(text, map(str, typing.get_args(kind)), n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if kind is float and re.fullmatch(r"-?\d+(\.\d+)?/\d+", text):
        return "; write the fraction as a decimal"
    return ""


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
