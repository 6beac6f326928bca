"""Inside `jax.shard_map`: over which mesh axes values vary. Outside, and with check_vma=False, none of them do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each marked as varying over every axis that any of them varies over.

    A function with its own backward pass needs this of its inputs: the cotangent of one that is the same on all devices
    is then summed over them.
    """
    axes = frozenset().union(*map(_axes, arrays))
    return tuple(_vary(jnp.asarray(x), axes) for x in arrays)


def like(array: jax.Array, tree: Any) -> Any:
    """The tree, each leaf marked as varying over the axes that `array` varies over, as the state of a loop must be."""
    return jax.tree.map(lambda x: _vary(x, _axes(array)), tree)


def shape_like(
    array: jax.Array, shape: Sequence[int] | None = None, dtype: jax.typing.DTypeLike | None = None
) -> jax.ShapeDtypeStruct:
    """A result of a kernel, which varies over mesh axes as `array` does; of its shape and dtype, unless given."""
    varying = jax.typeof(array).manual_axis_type
    shape = array.shape if shape is None else tuple(shape)
    return jax.ShapeDtypeStruct(shape, array.dtype if dtype is None else dtype, manual_axis_type=varying)


def _axes(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
