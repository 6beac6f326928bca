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
    """One official tensor: its name, its shape, whether ours is its transpose (with the heads split off), which of its
    rows are ours, first and one past the last, None: all; which axis has these rows, and what ours has more than it."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    rows: tuple[int, int] | None = None
    axis: int = 0
    offset: float = 0.0

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of those rows."""
        if self.rows is None:
            return self.shape
        return (*self.shape[: self.axis], self.rows[1] - self.rows[0], *self.shape[self.axis + 1 :])

    @property
    def place(self) -> tuple[slice, ...]:
        """Those rows, as an index."""
        return () if self.rows is None else (*(slice(None),) * self.axis, slice(*self.rows))


# The tensors of each parameter, all of one shape, by its path in the nnx state: in row-major order over the parameter's
# leading axes (passes, layers, experts).
Layout = dict[Path, tuple[Part, ...]]
# (path in a block, official tensor named as inside its layer) of each parameter of one block; a path comes again for
# every further expert.
BlockParts = Callable[[block.Settings], Iterator[tuple[Path, Part]]]
Place = Callable[[Path, np.ndarray], Any]  # a parameter's path and value f32 -> the array where it is to live
_SHOWN = 24  # names in a message
_AT_ONCE = 1 << 22  # numbers that are looked at together


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


def born(shapes: Any, layout: Layout, tensors: Mapping[str, Any], place: Place) -> Any:
    """A model's state like `shapes` with `tensors`, which were checked, as its parameters f32.

    Each is made by itself and given to `place`, so that the host holds no more than one of them beside what `place`
    keeps there; tensors that lie in files are read as they are needed.
    """
    filled = [
        (path, leaf.replace(place(path, _assembled(layout[path], tensors, leaf.shape))))
        for path, leaf in nnx.to_flat_state(shapes)
    ]
    return nnx.from_flat_state(filled)


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
    found: dict[str, list[tuple[Part, jax.Array]]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        parts = layout[path]
        shape = parts[0].own_shape
        value = leaf[...].reshape(-1, *(shape[::-1] if parts[0].transposed else shape))
        pieces = value.transpose(0, *range(len(shape), 0, -1)) if parts[0].transposed else value
        for piece, part in zip(pieces, parts, strict=True):
            found.setdefault(part.name, []).append((part, piece - part.offset if part.offset else piece))
    tensors = {name: _joined(pieces) for name, pieces in found.items()}
    _check_finite(kind, tensors)
    return tensors


def checked(
    kind: str, tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]
) -> dict[str, jax.Array]:
    """The tensors that `parts` names, in float32; aliases are other names of a tensor, which alone is read.

    Raises CheckpointError as `check` does.
    """
    check(kind, tensors, parts, aliases)
    return {name: jnp.asarray(tensors[name], jnp.float32) for name in parts}


def check(kind: str, tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]) -> None:
    """Raises CheckpointError, which lists all of it, for whatever is missing, unknown, misshapen, of integers or
    quantised, for numbers that are not finite in float32, and for an alias of other values."""
    unknown = [name for name in tensors if name not in parts and name not in aliases]
    missing = [name for name in parts if name not in tensors]
    wrong = _not_weights(tensors, parts, aliases)
    problems = []
    if wrong:
        more = f" ({len(wrong) - 1} more tensors are none of these either)" if len(wrong) > 1 else ""
        problems.append(f"{not_a_weight(wrong[0], dtype_name(tensors[wrong[0]]))}{more}")
    if missing:
        near = (difflib.get_close_matches(missing[0], unknown, n=1) or [""])[0]
        hint = f"; there is an unknown {near}" if near else ""
        shapes = [f"{name} {list(parts[name].shape)}" for name in missing]
        problems.append(f"{listed(shapes)} missing from the tensors{hint}")
    if unknown := [name for name in unknown if name not in wrong]:
        near = (difflib.get_close_matches(unknown[0], parts, n=1) or [""])[0]
        hint = f"; a name of this model is {near}" if near else ""
        problems.append(f"{listed(unknown)} unknown to a model of this configuration{hint}")
    there = {name: part for name, part in parts.items() if name in tensors}
    misfits = [name for name, part in there.items() if tuple(tensors[name].shape) != part.shape]
    problems += [_misshapen(name, tensors[name], parts[name].shape) for name in misfits]
    problems += _infinite({name: tensors[name] for name in there if name not in {*misfits, *wrong}})
    problems += [
        f"{other} is another name of {first} in a model of this configuration, but its values differ or are traced; "
        f"give {first} alone"
        for other, first in aliases.items()
        if other in tensors and not {other, first} & {*missing, *wrong} and not same(tensors[other], tensors[first])
    ]
    if problems:
        raise CheckpointError("\n".join(f"official {kind}: {problem}" for problem in problems))


def _not_weights(tensors: Mapping[str, Any], parts: Mapping[str, Part], aliases: Mapping[str, str]) -> list[str]:
    """Parameters that are no floats, and, where parameters are missing, anything that is none, as packed weights have
    names of their own."""
    other = [name for name, value in tensors.items() if dtype_name(value) not in FLOATS]
    complete = all(name in tensors for name in parts)
    return [name for name in other if not complete or name in parts or name in aliases]


def _check_finite(kind: str, tensors: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a known number is NaN, infinite, or beyond float32."""
    for problem in _infinite(tensors):
        raise CheckpointError(f"official {kind}: {problem}")


def _infinite(tensors: Mapping[str, Any]) -> list[str]:
    """What is wrong where a known number is NaN, infinite, or beyond float32; empty where nothing is."""
    bad = {name: count for name, value in tensors.items() if not traced(value) and (count := _not_finite(value))}
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and {sum(bad.values()) - count:,} in {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        return [
            f"{count:,} of the {math.prod(tensors[name].shape):,} numbers in {name} are not finite in float32{more}; "
            "such a model computes nothing"
        ]
    return []


def _not_finite(value: Any) -> int:
    """How many of the numbers are not; large tensors are looked at piece by piece."""
    size = math.prod(value.shape)
    rows = max(1, _AT_ONCE * (value.shape[0] if value.shape else 1) // max(size, 1))
    found = 0
    for piece in [value] if size <= _AT_ONCE else (value[i : i + rows] for i in range(0, value.shape[0], rows)):
        with np.errstate(over="ignore"):
            numbers = np.asarray(piece).astype(np.float32, copy=False)
        found += numbers.size - int(np.count_nonzero(np.isfinite(numbers)))
    return found


def misshapen(kind: str, name: str, value: Any, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor of another shape than `shape`."""
    return f"official {kind}: {_misshapen(name, value, shape)}"


def _misshapen(name: str, value: Any, shape: tuple[int, ...]) -> str:
    return f"{name} has shape {list(value.shape)}, expected {list(shape)}"


def same(a: Any, b: Any) -> bool:
    """Whether two tensors are known to hold the same values."""
    if a is b:
        return True
    return b is not None and not traced(a, b) and np.array_equal(np.asarray(a), np.asarray(b))


def traced(*tensors: Any) -> bool:
    """Whether the values of any tensor are not known yet."""
    return any(isinstance(tensor, jax.core.Tracer) for tensor in tensors)


def listed(names: Iterable[str]) -> str:
    """`names`, of very many the first, with the verb that follows them."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{rest} {'is' if len(names) == 1 else 'are'}"


def _parameter(parts: tuple[Part, ...], named: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The parameter of shape `shape` that lies in `parts`."""
    rows = [named[part.name][part.place] if part.rows else named[part.name] for part in parts]
    pieces = [piece.T if part.transposed else piece for piece, part in zip(rows, parts, strict=True)]
    whole = (jnp.stack(pieces) if len(pieces) > 1 else pieces[0]).reshape(shape)
    return whole + parts[0].offset if parts[0].offset else whole


def _assembled(parts: tuple[Part, ...], tensors: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """The same of tensors that are read as they are needed."""
    first = parts[0].own_shape
    whole = np.empty((len(parts), *(first[::-1] if parts[0].transposed else first)), np.float32)
    for into, part in zip(whole, parts, strict=True):
        piece = np.asarray(tensors[part.name])[part.place]
        into[...] = piece.T if part.transposed else piece
        if part.offset:
            into += np.float32(part.offset)
    return whole.reshape(shape)


def _joined(pieces: list[tuple[Part, jax.Array]]) -> jax.Array:
    """One tensor of the rows that parameters hold of it."""
    in_order = sorted(pieces, key=lambda one: one[0].rows or (0, 0))
    rows = [piece for _, piece in in_order]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=in_order[0][0].axis)
