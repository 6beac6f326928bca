"""Policies and caches as a user names them: NAME, or NAME(value, field=value)."""

import dataclasses
import re
from typing import TypeVar

from adaptive.errors import RecipeError, UserError
from adaptive.settings import Member, check_ranges, hints, nearest, parse

T = TypeVar("T", bound=Member)
_SHAPE = re.compile(r"([\w:.]+)(?:\((.*)\))?")


def named(door: type[T], text: str, option: str) -> T:
    """The member of a door that a text names; values without a field are in the order of its fields.

    Raises UserError for an unknown one, and fields that it does not have, with what there is.
    """
    shape = _SHAPE.fullmatch(text.strip())
    if shape is None:
        raise UserError(f"{option} {text}: expected NAME, or NAME(field=value, ...); names: {', '.join(door.kinds())}")
    kind, values = shape[1], [part.strip() for part in (shape[2] or "").split(",") if part.strip()]
    if kind not in door.kinds() and ":" not in kind:
        near = nearest(kind, door.kinds())
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{option} {kind}: there are {', '.join(door.kinds())}{hint}")
    member = door.member(kind, where=option)
    fields = [field.name for field in dataclasses.fields(member)]
    found = {}
    for i, value in enumerate(values):
        name, equals, rest = (part.strip() for part in value.partition("="))
        if not equals:
            name, rest = (fields[i] if i < len(fields) else ""), value
        if name not in fields or name in found:
            has = f"has {', '.join(fields)}" if fields else "has no fields"
            raise UserError(f"{option} {text}: '{value}' is no field of {kind}, which {has}")
        found[name] = parse(hints(member)[name], rest, where=f"{option} {kind}({name})")
    try:
        made = member(**found)
        check_ranges(made, f"{option} {kind}: ")
    except RecipeError as error:
        raise UserError(str(error)) from None
    return made
