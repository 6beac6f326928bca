"""The device mesh, and how experts use it: plain data."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from adaptive.errors import RecipeError
from adaptive.settings import divisors, ranged, since

Strategy = Literal["expert", "gather", "data", "tensor"]
ContextSchedule = Literal["auto", "ring", "both_ways", "token_ring", "gather"]

# Of the mesh, from the slowest links to the fastest: neighbours along `tensor` are neighbours in the machine.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """How experts are computed over the mesh's `expert` axis. No setting changes a model's outputs or its checkpoint.

    auto    the strategy that a cost model finds cheapest, of the four
    expert  tokens travel to the devices that hold their experts, and back
    gather  every device sees all tokens of the axis and computes its own experts on them; sums are scattered back
    data    every device gathers all experts' weights and computes its own tokens
    tensor  every device holds a slice of each expert's hidden units and sees all tokens of the axis
    """

    strategy: Literal["auto", "expert", "gather", "data", "tensor"] = "auto"
    exchange: Literal["flat", "hierarchical"] = (
        "flat"  # all-to-all at once, or within nodes first and then between them
    )
    nodes: int = ranged(
        1, least=1
    )  # nodes that the expert axis spans, each with as many devices; for exchange=hierarchical
    overlap: int = ranged(1, least=1)  # parts in which tokens travel: one is computed while the next is under way
    buffer_factor: float = -1.0  # rows that a device receives at most, over those it sends; -1: all that can ever come
    # Mesh axes that split the experts, `expert` among them: attention may use the others its own way.
    over: tuple[str, ...] = since(("expert",), before=["expert"])

    @property
    def axes(self) -> tuple[str, ...]:
        """`over` in the order of the mesh."""
        return tuple(axis for axis in AXES if axis in self.over)

    def validate(self, *, devices: int, experts: int = 0, ragged: bool | None = None) -> None:
        """Raises RecipeError for settings that do not fit the axis, the experts, or each other, with what would.

        devices  that the experts are split over: of the expert axis, or of several together
        experts  of each layer; 0: the model has none
        ragged   whether rows are sorted by expert, in groups of any size, or padded to a capacity; None: not known
        """
        name = "mesh.expert_parallel"
        self._check_axes(f"{name}.over")
        if not experts:
            if devices > 1:
                raise RecipeError(f"{self._axis()}={devices}: the model has no experts to split; it must be 1")
            return
        if experts % devices and self.strategy != "tensor":
            fits = divisors(experts)
            raise RecipeError(
                f"{self._axis()}={devices} does not divide the {experts} experts; it can be one of "
                f"{', '.join(map(str, fits))}, or {name}.strategy=tensor splits each expert's hidden units instead"
            )
        travels = self.strategy in ("auto", "expert")
        if devices % self.nodes:
            fits = divisors(devices)
            raise RecipeError(
                f"{name}.nodes={self.nodes} does not divide {self._axis()}={devices}; it can be one of "
                f"{', '.join(map(str, fits))}"
            )
        if self.exchange == "hierarchical":
            if len(self.over) > 1:
                raise RecipeError(f"{name}.exchange=hierarchical is for one axis; use exchange=flat, or over=expert")
            if self.nodes in (1, devices):
                raise RecipeError(
                    f"{name}.exchange=hierarchical with nodes={self.nodes} of {devices} devices has one level only: "
                    "nodes must be above 1 and below mesh.expert, or use exchange=flat"
                )
            if not travels or ragged:
                why = (
                    f"strategy={self.strategy} exchanges no tokens" if not travels else "ragged rows are sent directly"
                )
                raise RecipeError(f"{name}.exchange=hierarchical: {why}; use exchange=flat")
        if self.overlap > 1 and not travels:
            raise RecipeError(
                f"{name}.overlap={self.overlap}: strategy={self.strategy} exchanges no tokens; use overlap=1"
            )
        if self.buffer_factor != -1:
            if self.buffer_factor <= 0:
                raise RecipeError(f"{name}.buffer_factor={self.buffer_factor:g}: must be above 0, or -1 for no bound")
            if ragged is False:
                raise RecipeError(
                    f"{name}.buffer_factor bounds ragged rows; slots of a fixed capacity need none: use -1"
                )

    def _axis(self) -> str:
        return " * ".join(f"mesh.{axis}" for axis in self.axes)

    def _check_axes(self, at: str) -> None:
        can = AXES[1:]
        if "expert" not in self.over or len({*self.over}) < len(self.over) or not {*self.over} <= {*can}:
            raise RecipeError(
                f"{at}={','.join(self.over)}: must be expert, and may have others of {', '.join(can)}, each once"
            )


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """How attention is computed over the mesh's `context` axis.

    schedule  `MeshConfig.context_schedule`
    nodes     groups of the axis's devices that a slower network joins
    """

    schedule: ContextSchedule = "auto"
    nodes: int = 1


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: it takes the devices that the others leave.

    data     replicas: the batch is split, parameters are not
    fsdp     the batch is split, and so are parameters and optimizer state (gathered layer by layer)
    expert   the batch is split, and so are the experts of every layer
    tensor   heads, feed-forward and vocabulary are split
    context  every sequence is split, and so are parameters and optimizer state
    stage    the layers are split into consecutive parts, which micro-batches go through (a pipeline)
    slices   groups of devices that a slower network joins (TPU slices, nodes of GPUs). Not an axis: `data` runs across
             them, or as much of `stage`, `fsdp`, `expert` and `context` as is needed
    stage_groups  groups of consecutive layers of which every stage holds a part: 1 is the schedule 1F1B, more are the
             circular one, in which stages wait less and hand on more
    """

    data: int = ranged(-1, least=-1, most=2**31 - 1)
    fsdp: int = ranged(1, least=-1, most=2**31 - 1)
    expert: int = ranged(1, least=-1, most=2**31 - 1)
    tensor: int = ranged(1, least=-1, most=2**31 - 1)
    context: int = since(1, before=1, least=-1, most=2**31 - 1)
    stage: int = since(1, before=1, least=-1, most=2**31 - 1)
    slices: int = since(1, before=1, least=1, most=2**31 - 1)
    stage_groups: int = since(1, before=1, least=1, most=10_000)
    # How attention reads the rest of the sequence. ring: keys and values go around; both_ways: half of their heads in
    # each direction; token_ring: queries go around, results return; gather: every device gets all keys and values;
    # auto: what moves least, by `adaptive.parallel.context.choice`. None changes a result.
    context_schedule: ContextSchedule = since("auto", before="auto")
    expert_parallel: ExpertParallel = ExpertParallel()

    def validate(self, layers: Iterable[tuple[int, bool | None]]) -> None:
        """Raises RecipeError for settings that do not fit each other or the model.

        layers  how many experts each kind of layer has, and whether their rows are ragged (None: not known)
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size == 0:
                raise RecipeError(f"mesh.{axis}=0: must be at least 1, or -1 for the devices the other axes leave")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            others = f"mesh.{' and mesh.'.join(free)}"
            hint = "; mesh.data is -1 where it is not set: set it, to 1 for example" if "data" in free else ""
            raise RecipeError(f"{others} are both -1; only one axis can take what is left{hint}")
        over = [sizes.get(axis, 1) for axis in self.expert_parallel.over]
        known = -1 not in over  # else checked again when the devices are
        layers = list(layers)
        devices = math.prod(over) if known and layers else max(1, self.expert)
        for experts, ragged in layers or [(0, None)]:
            self.expert_parallel.validate(devices=devices if known else 1, experts=experts, ragged=ragged)
