"""The few types that routing speaks: Selection, AuxLosses, Told, Trace."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Selection(NamedTuple):
    """Which positions of each sequence go through a module, with static shapes.

    indices  i32[batch, capacity]   positions in the row, unique and ascending; a slot that holds nothing points at a
                                    position that is not selected. Of chunks, slots that hold something come first
    weights  f32[batch, capacity]   gate of each selected position; 0 where nothing is held
    valid    bool[batch, capacity]  whether the slot holds a position

    Ascending indices keep causal order: attention among selected tokens is ordinary causal attention on the compacted
    sequence, with the original positions in the rotary embedding.
    """

    indices: jax.Array
    weights: jax.Array
    valid: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=["form"])
@dataclasses.dataclass(frozen=True)
class Summed:
    """A loss as sums over a batch's positions, which add up over the micro-batches that a batch is computed in: a
    product of means over the batch is not the mean of what its micro-batches give.

    sums  arrays by name
    form  makes the loss f32[] of them; forms are compared, so a function of a module or a frozen dataclass
    """

    sums: Any
    form: Callable[[Any], jax.Array]

    @property
    def value(self) -> jax.Array:
        """The loss f32[]."""
        return self.form(self.sums)


class Aux(NamedTuple):
    """One auxiliary loss, its coefficient, and whether it is trained apart from the language-model loss.

    `separate` losses reach only parameters that the language-model loss does not reach (an auxiliary router behind a
    stop_gradient); they are no part of the total loss.
    """

    loss: Summed
    coefficient: float
    separate: bool = False

    @property
    def value(self) -> jax.Array:
        """The loss f32[] before its coefficient."""
        return self.loss.value


@jax.tree_util.register_pytree_node_class
class AuxLosses(dict[str, Aux]):
    """Named auxiliary losses; `total()` is what is added to the language-model loss."""

    def total(self) -> jax.Array:
        """Weighted sum f32[] of the losses trained together with the language-model loss."""
        return self._sum(separate=False)

    def separate_total(self) -> jax.Array:
        """Weighted sum f32[] of the losses trained apart from it."""
        return self._sum(separate=True)

    def _sum(self, *, separate: bool) -> jax.Array:
        terms = (a.coefficient * a.value for a in self.values() if a.separate == separate)
        return sum(terms, start=jnp.zeros((), jnp.float32))

    def scalars(self) -> dict[str, jax.Array]:
        """Values before their coefficients, under the names they are logged by."""
        return {f"aux/{name}": aux.value for name, aux in self.items()}

    def tree_flatten(self):
        names = tuple(sorted(self))
        static = tuple((name, self[name].coefficient, self[name].separate) for name in names)
        return tuple(self[name].loss for name in names), static

    @classmethod
    def tree_unflatten(cls, static, losses):
        return cls({name: Aux(loss, c, sep) for (name, c, sep), loss in zip(static, losses, strict=True)})


class Told(NamedTuple):
    """What a part did, returned by it and stacked by the scan over layers, one entry per call along leading axes.

    losses     auxiliary losses before their coefficients
    stats      sums over the positions of the batch, which add up over micro-batches and steps
    parts      arrays of losses that are formed over all calls together
    per_token  arrays [rows, n] by name, such as how many experts computed each position
    """

    losses: dict[str, Summed] = {}  # noqa: RUF012  # never changed in place
    stats: dict[str, jax.Array] = {}  # noqa: RUF012
    parts: dict[str, jax.Array] = {}  # noqa: RUF012
    per_token: dict[str, jax.Array] = {}  # noqa: RUF012

    def __bool__(self) -> bool:
        return bool(self.losses or self.stats or self.parts or self.per_token)


class StageTrace(NamedTuple):
    """What a chunking stage of an H-Net decided about the positions [batch, n] that reached it.

    With chunks packed per device, batch is the number of devices and n what the rows of one hold together.

    boundary_prob  f32[batch, n]   probability that a chunk begins here (H-Net paper, equation 4)
    boundary_mask  bool[batch, n]  whether one does
    demoted        bool[batch, n]  whether one would, had there been a slot left
    valid          bool[batch, n]  positions that exist
    selection      the boundaries, weighted by their probabilities, slots that hold one first: [batch, capacity]
    """

    boundary_prob: jax.Array
    boundary_mask: jax.Array
    demoted: jax.Array
    valid: jax.Array
    selection: Selection


class Trace(NamedTuple):
    """What was computed for each token. Metrics, the compute account, reports and analyses read it and nothing else.

    depth       i32[batch, seq]         passes through the shared block, 1 for models without recursion; 0 for positions
                                        that never reach it, being no chunk of an H-Net's innermost stage
    selections  one Selection per recursion, () where every token takes every step
    scalars     named f32[] statistics of this batch's routing, means over the batch; None without a router
    scores      one f32[batch, seq] per recursion: the decision score in [0, 1] of every position, NaN where the
                position was no candidate; () without a router
    load        f32[recursions]         tokens of each depth under token choice, None otherwise
    told        by path in the model: what its parts did, with the leading axes of their buffers
    stages      of an H-Net, from the bytes inwards; () otherwise
    """

    depth: jax.Array
    selections: tuple[Selection, ...] = ()
    scalars: dict[str, jax.Array] | None = None
    scores: tuple[jax.Array, ...] = ()
    load: jax.Array | None = None
    told: dict[str, Told] = {}  # noqa: RUF012  # never changed in place
    stages: tuple[StageTrace, ...] = ()

    def experts(self) -> dict[str, Told]:
        """The entries of routed feed-forwards."""
        return {path: told for path, told in self.told.items() if "claimed" in told.stats}

    def sums(self) -> dict[str, Any]:
        """What adds up over micro-batches and moves a model's buffers after a step."""
        load = {} if self.load is None else {"depth": self.load}
        return load | {path: told.stats for path, told in self.told.items() if told.stats}


class Readout(NamedTuple):
    """A further prediction from hidden states [rows, n, width], such as an early exit's, and its loss's coefficient."""

    name: str
    hidden: jax.Array
    coefficient: float


class Output(NamedTuple):
    """What every model returns: hidden [batch, seq, width] after the final norm, logits f32[batch, seq, vocab] or None
    when not asked for, the auxiliary losses, the trace, and further predictions."""

    hidden: jax.Array
    logits: jax.Array | None
    aux: AuxLosses
    trace: Trace
    readouts: tuple[Readout, ...] = ()
