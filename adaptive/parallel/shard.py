"""Local code on a mesh: the one place where layers reach shard_map."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from adaptive.errors import MeshError
from adaptive.parallel.rules import Placement, active_placement, split


def sharded(fn: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
    """`fn` on every device's part of its arguments; `fn` itself without a placement or where its mesh has one device.

    inputs   for each argument, the logical names of its leading dimensions as a tuple (others are whole), for all its
             arrays alike or as a tree with a tuple for each
    outputs  likewise. An output that is not split by a mesh axis must be equal on the devices along it

    Inside, mesh axes have names: collectives are `adaptive.parallel.exchange`. Gradients of arguments that an axis does
    not split are summed over it. Calls raise MeshError where an array does not divide over the mesh.
    """
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return fn
    mesh, rules, _ = current

    def specs(names: Any) -> Any:
        return jax.tree.map(lambda leaf: rules.spec(*leaf), names, is_leaf=_are_names)

    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs(names) for names in inputs),
        out_specs=specs(outputs),
        check_vma=False,  # Pallas kernels do not say along which axes their outputs vary
    )

    def call(*args: Any) -> Any:
        for names, arg in zip(inputs, args, strict=True):
            jax.tree.map(lambda leaf, arrays: _check(leaf, arrays, current), names, arg, is_leaf=_are_names)
        return mapped(*args)

    return call


def sum_of_parts(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[n, vocab, width], of which each of the n parts of the batch has its own -> [vocab, width]: their sum in `dtype`,
    where a parameter of these axes is stored. Over the axes that split it a device receives its share of the sum alone:
    half of what an all-reduce moves.

    It is the rows that are dealt out at first, if they can be: compilers for TPUs make an all-reduce of a
    reduce-scatter along the last dimension whose share is no multiple of 128.
    """
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return parts.sum(0).astype(dtype)
    mesh, rules, _ = current
    width, apart = _long(mesh, rules.width), _long(mesh, set(rules.batch) - set(rules.width))
    assert set(width) <= set(rules.batch), "parameters are stored along the batch"

    def summed(part: jax.Array) -> jax.Array:
        total = part[0]
        if width:
            dealt = 0 if total.shape[0] % split(mesh, width) == 0 else 1
            total = jax.lax.psum_scatter(total, width, scatter_dimension=dealt, tiled=True)
        total = (jax.lax.psum(total, apart) if apart else total).astype(dtype)
        return jax.lax.all_to_all(total, width, 1, 0, tiled=True) if width and not dealt else total

    return sharded(summed, [("batch", "vocab", None)], ("vocab", "width"))(parts)


def _long(mesh: Mesh, axes: Collection[str]) -> tuple[str, ...]:
    """Those of the axes that have more than one device, in the order of the mesh."""
    return tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)


def _are_names(node: Any) -> bool:
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)


def _check(names: tuple[str | None, ...], arrays: Any, current: Placement) -> None:
    for array in jax.tree.leaves(arrays):
        for size, name in zip(array.shape, names, strict=False):
            axes = getattr(current.rules, name) if name else ()
            parts = split(current.mesh, axes)
            if size % parts:
                raise MeshError(
                    f"an array of shape {array.shape} has {size} along '{name}', which the mesh splits over "
                    f"{'*'.join(axes)}={parts}: it must be a multiple of {parts}"
                )
