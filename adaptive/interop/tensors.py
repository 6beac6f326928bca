"""What every kind of official weights shares: which tensor is which parameter, read in both directions."""

import difflib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.models.config import TransformerConfig
from adaptive.models.transformer import Transformer

Path = tuple[Hashable, ...]


class Part(NamedTuple):
    """One official tensor: its name, its shape, and whether ours is its transpose (with the heads split off)."""

    name: str
    shape: tuple[int, ...]
    transposed: bool


class Leaf(NamedTuple):
    """One parameter of ours: `parts`, all of one shape, in row-major order over the leading axes `stack` (layers,
    experts)."""

    stack: tuple[int, ...]
    parts: tuple[Part, ...]


Layout = dict[Path, Leaf]  # by a parameter's path in the nnx state


def parts_of(layout: Layout) -> dict[str, Part]:
    """The official tensors of a layout by their names."""
    return {part.name: part for leaf in layout.values() for part in leaf.parts}


def built(config: TransformerConfig, layout: Layout, named: Mapping[str, jax.Array]) -> Transformer:
    """The model that `config` describes, with the tensors `named` as its parameters. Nothing is drawn."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, key=jax.random.key(0))))
    filled = [
        (path, leaf.replace(_parameter(layout[path], named, leaf.shape))) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def taken_apart(model: Transformer, layout: Layout) -> dict[str, jax.Array]:
    """The parameters of `model` as tensors f32 under their official names, each distinct one once."""
    tensors: dict[str, jax.Array] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        parts = layout[path].parts
        shape = parts[0].shape
        value = leaf[...].reshape(-1, *(shape[::-1] if parts[0].transposed else shape))
        pieces = value.swapaxes(1, 2) if parts[0].transposed else value
        tensors |= {part.name: piece for piece, part in zip(pieces, parts, strict=True)}
    return tensors


def checked(
    kind: str, tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]
) -> dict[str, jax.Array]:
    """The tensors that `parts` names, in float32; aliases are other names of a tensor, which alone is read.

    Raises CheckpointError for whatever is missing, unknown or misshapen, and for an alias of other values.
    """
    named: dict[str, jax.Array] = {}
    unknown = [name for name in tensors if name not in parts and name not in aliases]
    missing = [name for name in parts if name not in tensors]
    if missing:
        near = (difflib.get_close_matches(missing[0], unknown, n=1) or [""])[0]
        hint = f"; there is an unknown {near}" if near else ""
        shapes = [f"{name} {list(parts[name].shape)}" for name in missing]
        raise CheckpointError(f"official {kind}: {listed(shapes)} missing from the tensors{hint}")
    if unknown:
        near = (difflib.get_close_matches(unknown[0], parts, n=1) or [""])[0]
        hint = f"; a name of this model is {near}" if near else ""
        raise CheckpointError(f"official {kind}: {listed(unknown)} unknown to a model of this configuration{hint}")
    for name, part in parts.items():
        value = tensors[name]
        if tuple(value.shape) != part.shape:
            raise CheckpointError(misshapen(kind, name, value, part.shape))
        named[name] = jnp.asarray(value, jnp.float32)
    for other, first in aliases.items():
        if other in tensors and not same(tensors[other], tensors[first]):
            raise CheckpointError(
                f"official {kind}: {other} is another name of {first} in a model of this configuration, but its values "
                f"differ or are traced; give {first} alone"
            )
    return named


def misshapen(kind: str, name: str, value: Any, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor of another shape than `shape`."""
    return f"official {kind}: {name} has shape {list(value.shape)}, expected {list(shape)}"


def same(a: Any, b: Any) -> bool:
    """Whether two tensors are known to hold the same values."""
    if a is b:
        return True
    return b is not None and not traced(a, b) and np.array_equal(np.asarray(a), np.asarray(b))


def traced(*tensors: Any) -> bool:
    """Whether the values of any tensor are not known yet."""
    return any(isinstance(tensor, jax.core.Tracer) for tensor in tensors)


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, with the verb that follows them."""
    names = list(names)
    shown = ", ".join(names[:4])
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{shown}{rest} {'is' if len(names) == 1 else 'are'}"


def _parameter(leaf: Leaf, named: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The parameter of shape `shape` that `leaf` describes."""
    pieces = [named[part.name].T if part.transposed else named[part.name] for part in leaf.parts]
    return (jnp.stack(pieces) if leaf.stack else pieces[0]).reshape(shape)
