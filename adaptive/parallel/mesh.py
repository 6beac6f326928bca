"""The device mesh, and where each array of a state lives on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.errors import MeshError
from adaptive.parallel.config import AXES, ContextParallel, MeshConfig
from adaptive.parallel.rules import AxisRules
from adaptive.settings import divisors

# What runs across slices, in the order in which it is taken: it moves least for each byte that a step computes.
ACROSS_SLICES = ("data", "stage", "fsdp", "expert", "context")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes AXES over all devices (or those given), laid out as the devices are connected.

    Raises MeshError if the sizes do not multiply to the number of devices or do not run across the slices, saying which
    would.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    across = _across_slices(sizes, config.slices)
    within = [sizes[axis] // across[axis] for axis in AXES]
    parts = [_connected(within, part) for part in _slices(devices, config.slices)]
    numbers = np.arange(config.slices).reshape([across[axis] for axis in AXES])
    blocks = np.vectorize(parts.__getitem__, otypes=[object])(numbers)
    return Mesh(np.block(blocks.tolist()), AXES)


def context_parallel(config: MeshConfig, mesh: Mesh) -> ContextParallel:
    """How attention is computed over the mesh's context axis."""
    across = _across_slices(dict(mesh.shape), config.slices)
    return ContextParallel(config.context_schedule, across["context"])


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis over so many devices. Raises MeshError as `make_mesh`."""
    n = devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise MeshError(f"mesh.{axis}={size}: a mesh axis has at least 1 device (or -1 for what is left)")
    if len(free) > 1:
        raise MeshError(f"mesh.{' and mesh.'.join(free)} are both -1; only one axis can take what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if n % fixed or (not free and fixed != n):
        shape = " * ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] not in (1, -1)) or "1"
        raise MeshError(
            f"the mesh ({shape}) does not fit {n} device{'s' * (n > 1)}: the product of the axes must "
            f"{'divide' if free else 'equal'} {n}; each axis can be one of {', '.join(map(str, divisors(n)))}"
        )
    if free:
        sizes[free[0]] = n // fixed
    return sizes


def _across_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Into how many parts each axis is split by the slices; their product is `slices`."""
    across, left = dict.fromkeys(AXES, 1), slices
    for axis in ACROSS_SLICES:
        across[axis] = math.gcd(sizes[axis], left)
        left //= across[axis]
    if left > 1:
        fits = math.prod(sizes[axis] for axis in ACROSS_SLICES)
        raise MeshError(
            f"mesh.slices={slices} does not divide the mesh without its tensor axis ({fits} devices), which stays "
            f"within a slice; mesh.slices can be one of {', '.join(map(str, divisors(fits)))}"
        )
    return across


def _slices(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice: as they say themselves where they are of so many, else in order of their processes."""
    of = lambda device: getattr(device, "slice_index", None)  # noqa: E731
    named = sorted({name for device in devices if (name := of(device)) is not None})
    if slices == 1 and len(named) > 1 and devices[0].platform == "tpu":
        n = len(named)
        raise MeshError(f"these TPUs are of {n} slices, which a slower network joins: set mesh.slices={n}")
    if slices == 1:
        return [devices]
    if len(named) == slices:
        parts = [[device for device in devices if of(device) == name] for name in named]
        if len({len(part) for part in parts}) > 1:
            raise MeshError(
                f"the {slices} slices have different numbers of devices: {', '.join(str(len(p)) for p in parts)}"
            )
        return parts
    in_order, each = sorted(devices, key=lambda device: device.process_index), len(devices) // slices
    return [in_order[i * each : (i + 1) * each] for i in range(slices)]


def _connected(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice as an array whose neighbours are connected, where jax knows how; else in their order."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):  # a part of a machine, or one that it does not know
        return np.asarray(devices).reshape(shape)


def share_of_rows(mesh: Mesh, axes: Sequence[str], process: int) -> tuple[int, int]:
    """(index, count) of the share of an array's rows, split over `axes`, that a process's devices hold; (0, 1), all of
    them, where processes hold different ones that overlap."""
    last = [axis for axis in mesh.axis_names if axis not in axes]
    order = [mesh.axis_names.index(axis) for axis in (*axes, *last)]
    parts = mesh.devices.transpose(order).reshape(math.prod(mesh.shape[axis] for axis in axes), -1)
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(parts):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    shares = sorted({tuple(sorted(of_process)) for of_process in held.values()})
    if sum(map(len, shares)) > len(parts) or len({len(share) for share in shares}) > 1:
        return 0, 1
    return shares.index(tuple(sorted(held[process]))), len(shares)


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Sharding of [batch, seq] arrays that the data pipeline delivers."""
    return NamedSharding(mesh, rules.spec("batch", "seq"))


def place(tree: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """`tree` (of ShapeDtypeStructs or arrays) with each leaf replaced by its NamedSharding.

    Leaves under an nnx.Variable that carries `axes` follow the table; all others are replicated.
    Raises MeshError for every dimension that a mesh axis does not divide, with sizes that would.
    """
    problems: list[str] = []

    def one(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        value, axes = leaf.get_value(), leaf.get_metadata().get("axes")
        if not hasattr(value, "shape"):
            return leaf  # a parameter of another optimizer group leaves an empty place in this one's moments
        if axes is None:
            return leaf.replace(NamedSharding(mesh, P()))
        for size, name, over in zip(value.shape, axes, rules.axes_of(*axes), strict=True):
            split = math.prod(mesh.shape[a] for a in over)
            if size % split:
                problems.append(
                    f"{jax.tree_util.keystr(path)}: {name}={size} does not divide by {'*'.join(over)}={split}; "
                    f"sizes that divide it: {', '.join(map(str, [d for d in divisors(size) if d <= 4096]))}"
                )
        return leaf.replace(NamedSharding(mesh, rules.spec(*axes)))

    placed = jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if problems:
        more = f"\n(and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise MeshError("the model does not divide over the mesh:\n" + "\n".join(problems[:4]) + more)
    return placed
