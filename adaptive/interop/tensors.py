"""What every kind of official weights shares: which tensor is which parameter, read in both directions."""

import difflib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.errors import CheckpointError
from adaptive.interop.dtypes import FLOATS, dtype_name, not_a_weight
from adaptive.layers import block, stack
from adaptive.models import language_model
from adaptive.models.language_model import LanguageModel

Path = tuple[Hashable, ...]


class Part(NamedTuple):
    """One official tensor: its name, its shape, whether ours is its transpose (with the heads split off), and which of
    its rows are ours, first and one past the last; None: all."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    rows: tuple[int, int] | None = None

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of those rows."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])


# The tensors of each parameter, all of one shape, by its path in the nnx state: in row-major order over the parameter's
# leading axes (passes, layers, experts).
Layout = dict[Path, tuple[Part, ...]]
# (path in a block, official tensor named as inside its layer) of each parameter of one block; a path comes again for
# every further expert.
BlockParts = Callable[[block.Settings], Iterator[tuple[Path, Part]]]


def one(name: str, shape: tuple[int, ...], transposed: bool = False) -> tuple[Part]:
    """A parameter that is one tensor."""
    return (Part(name, shape, transposed),)


def stack_layout(path: Path, settings: stack.Settings, parts: BlockParts, *names: Sequence[str]) -> Layout:
    """Where the blocks of the stack at `path` lie.

    names  official name of each of its layers, in the order they run; once more for every further pass of a recursion
           that has parameters of its own
    """
    found: dict[Path, list[Part]] = {}
    for i, own in enumerate(settings.blocks):
        for name in (layers[number] for layers in names for number in settings.numbers(i)):
            for inner, part in parts(own):
                found.setdefault((*path, "blocks", i, *inner), []).append(part._replace(name=f"{name}.{part.name}"))
    return {path: tuple(pieces) for path, pieces in found.items()}


def parts_of(layout: Layout) -> dict[str, Part]:
    """The official tensors of a layout by their names."""
    return {part.name: part for parts in layout.values() for part in parts}


def built(settings: language_model.Settings, layout: Layout, named: Mapping[str, jax.Array]) -> LanguageModel:
    """The model that `settings` describe, with the tensors `named` as its parameters. Nothing is drawn."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: settings.build(jax.random.key(0))))
    filled = [
        (path, leaf.replace(_parameter(layout[path], named, leaf.shape))) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def language_model_of(kind: str, model: nnx.Module) -> LanguageModel:
    """The model itself; CheckpointError where it is another module."""
    if not isinstance(model, LanguageModel):
        raise CheckpointError(
            f"official {kind}: a {type(model).__name__} has no official names, only a LanguageModel has"
        )
    return model


def taken_apart(kind: str, model: LanguageModel, layout: Layout) -> dict[str, jax.Array]:
    """The parameters of `model` as tensors f32 under their official names, each distinct one once.

    Raises CheckpointError for numbers that are not finite: nobody could read them again.
    """
    found: dict[str, list[tuple[int, jax.Array]]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        parts = layout[path]
        shape = parts[0].own_shape
        value = leaf[...].reshape(-1, *(shape[::-1] if parts[0].transposed else shape))
        pieces = value.transpose(0, *range(len(shape), 0, -1)) if parts[0].transposed else value
        for piece, part in zip(pieces, parts, strict=True):
            found.setdefault(part.name, []).append((part.rows[0] if part.rows else 0, piece))
    in_order = {name: [rows for _, rows in sorted(pieces, key=lambda p: p[0])] for name, pieces in found.items()}
    tensors = {name: rows[0] if len(rows) == 1 else jnp.concatenate(rows) for name, rows in in_order.items()}
    _check_finite(kind, tensors)
    return tensors


def checked(
    kind: str, tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]
) -> dict[str, jax.Array]:
    """The tensors that `parts` names, in float32; aliases are other names of a tensor, which alone is read.

    Raises CheckpointError for whatever is missing, unknown, misshapen, of integers or quantised, for numbers that are
    not finite in float32, and for an alias of other values.
    """
    _check_dtypes(kind, tensors, parts, aliases)
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
        if tuple(tensors[name].shape) != part.shape:
            raise CheckpointError(misshapen(kind, name, tensors[name], part.shape))
    _check_finite(kind, {name: tensors[name] for name in parts})
    for other, first in aliases.items():
        if other in tensors and not same(tensors[other], tensors[first]):
            raise CheckpointError(
                f"official {kind}: {other} is another name of {first} in a model of this configuration, but its values "
                f"differ or are traced; give {first} alone"
            )
    return {name: jnp.asarray(tensors[name], jnp.float32) for name in parts}


def _check_dtypes(kind: str, tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]) -> None:
    """Raises CheckpointError for a parameter that is no float, and, where parameters are missing, for anything that is
    none, as packed weights have names of their own."""
    other = [name for name, value in tensors.items() if dtype_name(value) not in FLOATS]
    complete = all(name in tensors for name in parts)
    wrong = [name for name in other if not complete or name in parts or name in aliases]
    if wrong:
        more = f" ({len(wrong) - 1} more tensors are none of these either)" if len(wrong) > 1 else ""
        raise CheckpointError(f"official {kind}: {not_a_weight(wrong[0], dtype_name(tensors[wrong[0]]))}{more}")


def _check_finite(kind: str, tensors: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a known number is NaN, infinite, or beyond float32."""
    bad = {name: count for name, value in tensors.items() if not traced(value) and (count := _not_finite(value))}
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and {sum(bad.values()) - count:,} in {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise CheckpointError(
            f"official {kind}: {count:,} of the {math.prod(tensors[name].shape):,} numbers in {name} are not finite in "
            f"float32{more}; such a model computes nothing"
        )


def _not_finite(value: Any) -> int:
    with np.errstate(over="ignore"):
        numbers = np.asarray(value).astype(np.float32, copy=False)
    return numbers.size - int(np.count_nonzero(np.isfinite(numbers)))


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


def _parameter(parts: tuple[Part, ...], named: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The parameter of shape `shape` that lies in `parts`."""
    rows = [named[part.name][slice(*part.rows)] if part.rows else named[part.name] for part in parts]
    pieces = [piece.T if part.transposed else piece for piece, part in zip(rows, parts, strict=True)]
    return (jnp.stack(pieces) if len(pieces) > 1 else pieces[0]).reshape(shape)
