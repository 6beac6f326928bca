"""What of a state every device has whole, though an axis of the mesh could split it."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from adaptive.parallel.expert_cost import show_bytes
from adaptive.peaks import memory_of
from adaptive.training.program import Program

SHARE = 0.1  # of a device's memory, from which on copies are told of
LEAST = 2**30  # bytes of the same where the memory is not known


def lines_of(program: Program) -> list[str]:
    """A line where much of the state is the same along `mesh.data`, and the axis `fsdp` would split it; else none."""
    mesh = program.mesh
    size, fsdp, memory = mesh.shape["data"], mesh.shape["fsdp"], memory_of(mesh.devices.flat[0].device_kind)
    arrays = list(_splittable(program))
    held = sum(size for size, _ in arrays)
    saved = held - held // size
    if saved < (SHARE * memory if memory else LEAST):
        return []
    largest, where = max(arrays)
    return [
        f"{show_bytes(held)} of parameters and optimizer state are the same on all {size} devices of mesh.data (the "
        f"largest, {where}: {show_bytes(largest)}); mesh.fsdp={fsdp * size} mesh.data=1 would leave each "
        f"{show_bytes(held - saved)}"
    ]


def _splittable(program: Program) -> Iterator[tuple[int, str]]:
    """(bytes on a device, path) of every array of the state that fsdp splits."""
    state = program.abstract_state()
    found = jax.tree_util.tree_leaves_with_path((state.params, state.opt, state.ema), is_leaf=_is_variable)
    for path, variable in found:
        axes = variable.get_metadata().get("axes") if _is_variable(variable) else None
        value: Any = variable.get_value() if axes and "width" in axes else None
        if hasattr(value, "sharding"):
            held = math.prod(value.sharding.shard_shape(value.shape)) * value.dtype.itemsize
            yield held, jax.tree_util.keystr(path[1:], simple=True, separator=".")


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
