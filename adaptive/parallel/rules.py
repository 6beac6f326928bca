"""Sharding is one table: from the logical axis names that layers speak to the axes of the mesh."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.parallel.config import ContextParallel, ExpertParallel
from kernels_pallas.choice import Kernels, target


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes over which each logical axis is split; () is replicated."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")  # activations [batch, seq, ...]
    seq: tuple[str, ...] = ("context",)  # the same
    width: tuple[str, ...] = ("fsdp", "context")  # parameters only, by axes that split no other dimension: gathered
    heads: tuple[str, ...] = ("tensor",)  # [width, heads, head_dim] and activations [batch, seq, heads, head_dim]
    ff: tuple[str, ...] = ("tensor",)  # [width, ff] and activations [batch, seq, ff]
    vocab: tuple[str, ...] = ("tensor",)  # [vocab, width]
    experts: tuple[str, ...] = ("expert",)  # parameters [experts, ...]
    expert_seq: tuple[str, ...] = ("context",)  # as seq, of activations that experts compute
    expert_ff: tuple[str, ...] = ("tensor",)  # parameters [experts, width, expert_ff]
    layers: tuple[str, ...] = ()  # of parameters of several layers, which a scan runs over
    stages: tuple[str, ...] = ("stage",)  # the same, where a pipeline splits them; of its activations the first
    uses: tuple[str, ...] = ()  # of parameters that each pass of a recursion has of its own

    @property
    def tokens(self) -> tuple[str, ...]:
        """Of parts of the batch and, in each, of sequences."""
        return (*self.batch, *self.seq)

    def spec(self, *names: str | None) -> P:
        """The PartitionSpec of an array whose dimensions have these logical names (None: replicated).

        Raises ValueError for an unknown name and for a mesh axis that would split two dimensions.
        """
        parts = self.axes_of(*names)
        used = [axis for part in parts for axis in part]
        twice = sorted({a for a in used if used.count(a) > 1})
        if twice:
            raise ValueError(f"{names}: mesh axis {twice} would split two dimensions; change one rule")
        return P(*(None if not part else part[0] if len(part) == 1 else part for part in parts))

    def axes_of(self, *names: str | None) -> list[tuple[str, ...]]:
        """The mesh axes that split each dimension of an array. Raises ValueError for an unknown name."""
        known = {f.name for f in dataclasses.fields(self)} | {"tokens"}
        unknown = sorted({n for n in names if n} - known)
        if unknown:
            raise ValueError(f"logical axes {unknown} are not in the table; it has {sorted(known)}")
        others = {axis for n in names if n and n != "width" for axis in getattr(self, n)}
        left = tuple(axis for axis in self.width if axis not in others)
        return [left if n == "width" else getattr(self, n) if n else () for n in names]


def axis_rules(experts: ExpertParallel, vocab: tuple[str, ...] = ("tensor",)) -> AxisRules:
    """The table for a way to compute experts: `tensor` splits their hidden units where the others split the experts. If
    experts are split over the axis `tensor`, so are the tokens that they compute. vocab: axes that split the
    vocabulary.

    Raises ValueError for the strategy "auto", which is to be settled first (`expert_cost.settled`).
    """
    if experts.strategy == "auto":
        raise ValueError("where parameters live depends on the strategy; settle it first")
    over = experts.axes
    hidden = () if "tensor" in over else ("tensor",)
    seq = ("context", "tensor") if "tensor" in over else ("context",)
    if experts.strategy == "tensor":
        return AxisRules(experts=(), expert_ff=(*over, *hidden), expert_seq=seq, vocab=vocab)
    return AxisRules(experts=over, expert_ff=hidden, expert_seq=seq, vocab=vocab)


TOKENS_TRAVEL = ExpertParallel(strategy="expert")


class Placement(NamedTuple):
    """What logical names mean: a mesh, the table, and how experts and split sequences are computed."""

    mesh: Mesh
    rules: AxisRules
    experts: ExpertParallel
    context: ContextParallel


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


def active_placement() -> Placement | None:
    return _placement.get()


@contextlib.contextmanager
def placement(
    mesh: Mesh,
    rules: AxisRules,
    experts: ExpertParallel = TOKENS_TRAVEL,
    kernels: Kernels = "auto",
    context: ContextParallel = ContextParallel(),  # noqa: B008 - immutable
) -> Iterator[None]:
    """Within it, logical names mean axes of `mesh`; outside, annotations are void. Jitted code is traced inside.

    Operations have the forms for the mesh's devices, and with kernels="reference" those of XLA.
    Raises ValueError for a table that places experts otherwise than their strategy needs (`axis_rules` gives one).
    """
    if (set(experts.over) <= set(rules.expert_ff)) != (experts.strategy == "tensor"):
        raise ValueError(f"the table splits expert_ff over {rules.expert_ff}, which is not strategy={experts.strategy}")
    token = _placement.set(Placement(mesh, rules, experts, context))
    try:
        device = mesh.devices.flat[0]
        with target(device.platform, kernels, device.device_kind):
            yield
    finally:
        _placement.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its dimensions placed by their logical names; unchanged where no placement is active."""
    current = _placement.get()
    if current is None:
        return x
    mesh, rules = current.mesh, current.rules
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(*names)))


def batch_shards() -> int:
    """Into how many parts the active placement splits the batch (1 without one)."""
    current = _placement.get()
    if current is None:
        return 1
    return split(current.mesh, current.rules.batch)


def seq_shards(name: str = "seq") -> int:
    """Into how many parts the active placement splits every sequence (1 without one); name: of its logical axis."""
    current = _placement.get()
    return 1 if current is None else split(current.mesh, getattr(current.rules, name))


def along(length: int) -> str | None:
    """The logical name of a dimension with so many positions of each row: "seq" where it divides over the parts of a
    sequence, else None, as of single positions of generation."""
    return "seq" if length % seq_shards() == 0 else None


def even(length: int, name: str = "seq") -> int:
    """The least length from this one on that divides over the parts of a sequence."""
    parts = seq_shards(name)
    return -(-length // parts) * parts


def whole_rows(x: jax.Array) -> jax.Array:
    """[batch, n, ...], numbers that say which positions are taken: whole on every device that has a part of the row, as
    what compares all positions of a row needs them. Of numbers by position alone, not of activations."""
    return x if seq_shards() == 1 else constrain(x, "batch", *(None,) * (x.ndim - 1))


def device_kind() -> str:
    """What jax calls the devices that programs are made for: those of the active placement, or of this machine."""
    current = _placement.get()
    return (jax.devices()[0] if current is None else current.mesh.devices.flat[0]).device_kind


def axis_size(axis: str) -> int:
    """Devices of the active placement along a mesh axis (1 without one)."""
    current = _placement.get()
    return 1 if current is None else current.mesh.shape.get(axis, 1)


def split(mesh: Mesh, axes: Iterable[str]) -> int:
    """Into how many parts these axes of the mesh split an array's dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)


def gathered(value: jax.Array, axes: tuple[str | None, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter ready for use: cast to `dtype` first, so that the gather over "width" moves the small type.

    axes  logical names of the parameter's dimensions; leading ones that a scan has consumed are ignored.
    """
    names = axes[len(axes) - value.ndim :]
    small = narrowed(value, dtype) if "width" in names else value.astype(dtype)
    # What uses experts gives their gradients as they are stored (`shard.lent`).
    scattered = "experts" in names or ("width" in names and _scatters())
    return _scattered(small, tuple(names)) if scattered else constrain(small, *whole(names))


def _scatters() -> bool:
    """Whether gradients are to be said to be split as parameters are. Left to itself XLA sums them whole over all
    devices where there are replicas, or a parameter is used several times, and cuts them afterwards (seen for TPUs and
    GPUs). For TPUs without replicas it finds the scatter of what is used once by itself, and being told it multiplies
    piece by piece instead, in pieces as narrow as a device's share."""
    current = _placement.get()
    if current is None:
        return False
    platform, width = current.mesh.devices.flat[0].platform, split(current.mesh, current.rules.width)
    replicas = batch_shards() > width
    return width > 1 and (platform == "gpu" or (platform == "tpu" and replicas))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scattered(value: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Gathered, with a gradient that is not."""
    return constrain(value, *whole(names))


_scattered.defvjp(lambda value, names: (_scattered(value, names), None), lambda names, _, g: (constrain(g, *names),))


def whole(names: Iterable[str | None]) -> tuple[str | None, ...]:
    """Names of a parameter's dimensions where it is used: over "width" it is split where it is stored alone."""
    return tuple(None if name == "width" else name for name in names)


def narrowed(value: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter with an axis "width", as it is stored, in the dtype in which it is to be gathered.

    Left to itself XLA casts behind the gather, which then moves float32 (seen for TPUs and GPUs, of parameters that a
    backward pass gathers again).
    """
    small, current = value.astype(dtype), _placement.get()
    if small.dtype == value.dtype or current is None or split(current.mesh, current.rules.width) == 1:
        return small
    return jax.lax.optimization_barrier(small)


def constrain_state(state: Any) -> Any:
    """A state of parameters (or its gradient) with every variable placed as its logical axes say."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes")
        return variable if axes is None else variable.replace(constrain(variable.get_value(), *axes))

    return jax.tree.map(one, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
