"""Local code on a mesh: the one place where layers reach shard_map."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

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
