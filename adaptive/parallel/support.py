"""What cannot be computed over which axis of the mesh: one table, which the check, the documents and the tests read."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from adaptive import settings
from adaptive.errors import MeshError


class Unsupported(NamedTuple):
    """axis    of the mesh, with several devices
    beside  another such axis, or a part of the model, or a choice in its settings, by door and kind:
            "depth.token_choice", "bodies.recursive.order=sequence"
    reason  why not, and what would work
    """

    axis: str
    beside: str
    reason: str


UNSUPPORTED = (
    Unsupported(
        "stage",
        "bodies.recursive.order=sequence",
        "layers repeat in place, where a pipeline has left them: mesh.stage must be 1, or order=cycle",
    ),
    *(
        Unsupported(
            "stage",
            f"bodies.recursive.keys_values={value}",
            "stages do not keep the first pass's keys and values of every micro-batch: mesh.stage must be 1, or "
            "keys_values=per_recursion",
        )
        for value in ("shared", "hybrid")
    ),
)


def parts_of(model: Any) -> set[str]:
    """Every part of a model's settings by door and kind, and its choices."""
    found = set()
    for _, node in settings.nodes(model, "model"):
        if isinstance(node, settings.Member):
            part = f"{node.door.rpartition('.')[2]}.{node.kind()}"
            texts = {field.name: value for field, _, value in settings.fields(node) if isinstance(value, str)}
            found |= {part, *(f"{part}.{name}={value}" for name, value in texts.items())}
    return found


def check_support(sizes: Mapping[str, int], parts: Iterable[str]) -> None:
    """Raises MeshError for the first pair of the table among the axes of several devices and a model's parts."""
    long = {axis for axis, size in sizes.items() if size > 1}
    present = {*long, *parts}
    for axis, beside, reason in UNSUPPORTED:
        if axis in long and beside in present:
            other = f"mesh.{beside}={sizes[beside]}" if beside in long else beside
            raise MeshError(f"mesh.{axis}={sizes[axis]} with {other}: {reason}")
