"""What cannot be computed over which axis of the mesh: one table, which the check, the documents and the tests read."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from adaptive import settings
from adaptive.errors import MeshError

EVERY = "every model"


class Unsupported(NamedTuple):
    """axis    of the mesh, with several devices
    beside  another such axis, a part of the model by door and kind ("depth.token_choice"), or EVERY
    reason  why not, and what would work
    """

    axis: str
    beside: str
    reason: str


UNSUPPORTED: tuple[Unsupported, ...] = ()


def parts_of(model: Any) -> set[str]:
    """Every part of a model's settings, by door and kind."""
    members = (node for _, node in settings.nodes(model, "model") if isinstance(node, settings.Member))
    return {f"{member.door.rpartition('.')[2]}.{member.kind()}" for member in members}


def check_support(sizes: Mapping[str, int], parts: Iterable[str]) -> None:
    """Raises MeshError for the first pair of the table among the axes of several devices and a model's parts."""
    long = {axis for axis, size in sizes.items() if size > 1}
    present = {EVERY, *long, *parts}
    for axis, beside, reason in UNSUPPORTED:
        if axis in long and beside in present:
            other = f"mesh.{beside}={sizes[beside]}" if beside in long else beside
            with_other = "" if beside == EVERY else f" with {other}"
            raise MeshError(f"mesh.{axis}={sizes[axis]}{with_other}: {reason}")
