"""The device mesh, and where each array of a state lives on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.errors import MeshError
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.rules import AxisRules
from adaptive.settings import divisors

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp", "expert", "tensor") over all devices (or those given).

    Raises MeshError if the sizes do not multiply to the number of devices, saying which would.
    """
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
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
    return Mesh(np.asarray(devices).reshape([sizes[axis] for axis in AXES]), AXES)


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
        for size, name in zip(value.shape, axes, strict=True):
            over = getattr(rules, name) if name else ()
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
