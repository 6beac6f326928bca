"""Local code on a mesh: the one place where layers reach shard_map."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.errors import MeshError
from adaptive.parallel.rules import Placement, active_placement, split, whole

Names = tuple[str | None, ...]


class Lent(NamedTuple):
    """Stands, for `sharded`, for what `lent` makes of a parameter with these names."""

    names: Names


def sharded(fn: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
    """`fn` on every device's part of its arguments; `fn` itself without a placement or where its mesh has one device.

    inputs   for each argument, the logical names of its leading dimensions as a tuple (others are whole), for all its
             arrays alike or as a tree with a tuple for each
    outputs  likewise. An output that is not split by a mesh axis must be equal on the devices along it

    Inside, mesh axes of several devices have names: collectives are `adaptive.parallel.exchange`. Gradients of
    arguments that an axis does not split are summed over it. Calls raise MeshError where an array does not divide over
    the mesh.
    """
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return fn

    def call(*args: Any) -> Any:
        for names, arg in zip(inputs, args, strict=True):
            jax.tree.map(lambda leaf, arrays: _check(leaf, arrays, current), names, arg, is_leaf=_are_names)
        return mapped(*args)

    specs = lambda names: jax.tree.map(lambda leaf: _spec(leaf, current), names, is_leaf=_are_names)  # noqa: E731
    mapped = _mapped(fn, current.mesh, tuple(map(specs, inputs)), specs(outputs))
    return call


def _mapped(fn: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`fn` by trees of PartitionSpecs, over the axes that have several devices: gradients of what an axis does not
    split are summed over it, and compilers for TPUs leave such a sum over one device in the program."""
    axes = _long(mesh, mesh.axis_names)

    def over(spec: P) -> P:
        parts = [(part,) if isinstance(part, str) else part or () for part in spec]
        return P(*(tuple(axis for axis in part if axis in axes) for part in parts))

    inputs, outputs = jax.tree.map(over, (inputs, outputs), is_leaf=lambda node: isinstance(node, P))
    several = Mesh(mesh.devices.reshape([mesh.shape[axis] for axis in axes]), axes)
    # Pallas kernels do not say along which axes their outputs vary.
    return jax.shard_map(fn, mesh=several, in_specs=inputs, out_specs=outputs, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def lent(value: jax.Array, names: Names) -> jax.Array:
    """A parameter that is ready for use, once for each part of the batch and of sequences that has all of it: [n, ...].
    Its gradients are summed by `sum_of_parts`; those of an argument of `sharded` would be by an all-reduce.

    names  of the dimensions as it is stored. What `sharded` is to be told of the result is `Lent(names)`
    """
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return value[None]
    mesh, spec = current.mesh, _spec(Lent(names), current)
    copies = jnp.broadcast_to(value, (split(mesh, spec[0] or ()), *value.shape))
    return jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, spec))


def _returned(names: Names, _: None, copies: jax.Array) -> tuple[jax.Array]:
    current = active_placement()
    on_gpus = current is not None and current.mesh.devices.flat[0].platform == "gpu"
    return (sum_of_parts(copies, copies.dtype, names, deal=not on_gpus),)  # those scatter along any dimension alike


lent.defvjp(lambda value, names: (lent(value, names), None), _returned)


def sum_of_parts(
    parts: jax.Array, dtype: jax.typing.DTypeLike, names: Names = ("vocab", "width"), deal: bool = True
) -> jax.Array:
    """[n, ...], of which each of the n parts of the batch and of sequences has its own -> [...]: their sum in `dtype`,
    where a parameter of these axes is stored. Over the axes that split it a device receives its share of the sum alone:
    half of what an all-reduce moves.

    deal  hand out another dimension than the width at first, if one can be: compilers for TPUs make an all-reduce of a
          reduce-scatter along the last dimension whose share is no multiple of 128
    """
    current = active_placement()
    if current is None or current.mesh.size == 1:
        return parts.sum(0).astype(dtype)
    mesh, rules = current.mesh, current.rules
    spec = _spec(Lent(names), current)
    parts_over = _long(mesh, spec[0] or ())
    width = _long(mesh, rules.axes_of(*names)[names.index("width")]) if "width" in names else ()
    apart = tuple(axis for axis in parts_over if axis not in width)
    assert set(width) <= set(parts_over), "parameters are stored along the tokens"

    def summed(part: jax.Array) -> jax.Array:
        total = part[0]
        if not width:
            return (jax.lax.psum(total, apart) if apart else total).astype(dtype)
        at = names.index("width")
        fit = (i for i, size in enumerate(total.shape) if deal and i != at and size % split(mesh, width) == 0)
        dealt = next(fit, at)
        total = jax.lax.psum_scatter(total, width, scatter_dimension=dealt, tiled=True)
        total = (jax.lax.psum(total, apart) if apart else total).astype(dtype)
        return total if dealt == at else jax.lax.all_to_all(total, width, at, dealt, tiled=True)

    return _mapped(summed, mesh, (spec,), rules.spec(*names))(parts)


def _long(mesh: Mesh, axes: Collection[str]) -> tuple[str, ...]:
    """Those of the axes that have more than one device, in the order of the mesh."""
    return tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)


def _spec(names: "Names | Lent", current: Placement) -> P:
    if not isinstance(names, Lent):
        return current.rules.spec(*names)
    rest = current.rules.spec(*whole(names.names))
    used = {axis for part in rest for axis in ((part,) if isinstance(part, str) else part or ())}
    return P(tuple(axis for axis in current.rules.tokens if axis not in used), *rest)


def _are_names(node: Any) -> bool:
    return isinstance(node, Lent) or (
        type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
    )


def _check(names: "Names | Lent", arrays: Any, current: Placement) -> None:
    for array in jax.tree.leaves(arrays):
        shape, own = (array.shape[1:], whole(names.names)) if isinstance(names, Lent) else (array.shape, names)
        for size, name, axes in zip(shape, own, current.rules.axes_of(*own), strict=False):
            parts = split(current.mesh, axes)
            if size % parts:
                raise MeshError(
                    f"an array of shape {array.shape} has {size} along '{name}', which the mesh splits over "
                    f"{'*'.join(axes)}={parts}: it must be a multiple of {parts}"
                )
