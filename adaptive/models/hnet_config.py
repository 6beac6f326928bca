"""Shapes and chunking of an H-Net: plain data, importable without jax."""

import dataclasses
from typing import Any, Literal, get_args

from adaptive.errors import RecipeError
from adaptive.layers.layout import BlockShape, ChunkerKind, Layout, parse_layout

CHUNKERS: tuple[ChunkerKind, ...] = get_args(ChunkerKind)
LEARNED = ("dynamic", "similarity")
MULTIPLE = 128  # capacities are rounded up to it


@dataclasses.dataclass(frozen=True)
class HNetConfig:
    """Hierarchical networks with dynamic chunking (H-Net paper, section 2; released code, config_hnet.py).

    Numbers in tuples belong to stages, stage 0 the bytes; a single one holds for all. An empty layout is no H-Net.

    layout          nested list as JSON, see adaptive.layers.layout
    windows         positions to the left that attention sees; -1: all
    chunkers        what decides where a chunk begins, one per chunking stage:
                    dynamic     cosine of neighbours, learned (H-Net)
                    similarity  the same from projections that start at random; random flips in training (ConceptMoE)
                    stride      every `ratio_targets` positions
                    space       at a byte like a space after one that is not (SpaceByte); the first stage alone
                    words       where the batch says (data.boundaries=words: HAT's splitter); the first stage alone
                    none        everywhere
    merge           what a chunk's vector is: that of its boundary position, or the sum over the positions since the
                    boundary before it (ConceptMoE)
    ratio_targets   positions per chunk that the ratio loss pulls to
    ratio_over      positions that the ratio loss averages over: all of the batch, or each device's own (the release)
    capacities      share of a stage's positions that can be chunks in training; () is all. With `capacity_steps`, as
                    many again for every step named there, from which on they hold
    packing         capacity of each row, or of all rows of a device together
    """

    layout: str = ""
    widths: tuple[int, ...] = ()
    intermediates: tuple[int, ...] = ()
    heads: tuple[int, ...] = (1,)
    rotary_dims: tuple[int, ...] = (0,)
    windows: tuple[int, ...] = (-1,)
    expand: tuple[int, ...] = (2,)
    d_state: tuple[int, ...] = (128,)
    d_conv: tuple[int, ...] = (4,)
    ssm_head_dim: tuple[int, ...] = (64,)
    ssm_block: tuple[int, ...] = (256,)
    embedding_std: float = 1.0
    chunkers: tuple[str, ...] = ("dynamic",)
    merge: Literal["boundary", "sum"] = "boundary"
    flip_temperature: float = 6.0  # of the similarity chunker's noise (ConceptMoE); 0: none
    ratio_targets: tuple[float, ...] = (6.0,)
    ratio_coefficient: float = 0.03
    ratio_over: Literal["global", "device"] = "global"
    capacities: tuple[float, ...] = ()
    capacity_steps: tuple[int, ...] = ()
    packing: Literal["row", "device"] = "row"

    def parsed(self) -> Layout:
        """The layout; raises RecipeError naming the position of what is not of the grammar."""
        return parse_layout(self.layout)

    @property
    def stages(self) -> int:
        """How many stages chunk; 0 for a byte-level stack without chunking and for no H-Net at all."""
        return self.parsed().stages if self.layout else 0

    def shape(self, stage: int) -> BlockShape:
        """The blocks' shape at a stage, 0 the bytes."""
        return BlockShape(*(_at(getattr(self, name), stage) for name in _PER_STAGE))

    def chunker(self, stage: int) -> ChunkerKind:
        return _at(self.chunkers, stage)

    def learned(self, stage: int) -> bool:
        """Whether the stage's chunker has parameters, and so a ratio loss."""
        return self.chunker(stage) in LEARNED

    def target(self, stage: int) -> float:
        return _at(self.ratio_targets, stage)

    def capacity(self, stage: int, positions: int) -> int:
        """Slots for the chunks of `positions` positions of a stage, rounded up as matmuls and attention like it."""
        fraction = self.capacities[stage] if self.capacities else 1.0
        multiple = MULTIPLE if fraction * positions > MULTIPLE else 8
        return min(positions, -(-max(1, int(fraction * positions)) // multiple) * multiple)

    def at_phase(self, phase: int) -> "HNetConfig":
        """The configuration from step capacity_steps[phase - 1] on (phase 0: from the first), without a schedule."""
        own = self.capacities[phase * self.stages : (phase + 1) * self.stages]
        return dataclasses.replace(self, capacities=own, capacity_steps=())

    def validate(self, *, inner_width: int) -> None:
        """Raises RecipeError for the first setting that cannot work. inner_width: of the model inside, if there is."""
        if not self.layout:
            return
        layout = self.parsed()
        for name in _PER_STAGE:
            self._check_count(name, layout.stages + 1, required=name in ("widths", "heads"))
        for stage in range(layout.stages + 1):
            self._check_stage(layout, stage)
        widths = [_at(self.widths, s) for s in range(layout.stages + 1)]
        for stage in range(layout.stages):
            if widths[stage + 1] < widths[stage]:
                raise RecipeError(
                    f"model.hnet.widths={','.join(map(str, widths))}: stage {stage + 1} is narrower than the one "
                    "around it; widths must not shrink inwards"
                )
        if layout.house and widths[-1] != inner_width:
            raise RecipeError(
                f"model.hnet.widths ends in {widths[-1]}, but the model inside has model.hidden_size={inner_width}"
            )
        self._check_chunking(layout.stages)

    def _check_count(self, name: str, stages: int, *, required: bool) -> None:
        values = getattr(self, name)
        if len(values) not in (1, stages) and (values or required):
            raise RecipeError(
                f"model.hnet.{name} has {len(values)} numbers for {stages} stage{'s' * (stages > 1)} of "
                f"model.hnet.layout={self.layout}; give one for each, or a single one for all"
            )

    def _check_stage(self, layout: Layout, stage: int) -> None:
        shape, runs = self.shape(stage), [run for blocks in layout.at(stage) for run in blocks]

        def refuse(letter: str, why: str) -> None:
            raise RecipeError(f"model.hnet.layout at stage {stage}, letter {letter}: {why}")

        for run in runs:
            if run.has_feed_forward and shape.intermediate < 1:
                refuse(run.letter, f"it has a feed-forward, so model.hnet.intermediates must be above 0 at {stage}")
            if run.attends and shape.width % shape.heads:
                refuse(run.letter, f"width {shape.width} is not a multiple of the {shape.heads} attention heads")
            if run.attends and (shape.rotary_dim % 2 or not 0 <= shape.rotary_dim <= shape.head_dim):
                refuse(
                    run.letter, f"rotary_dims={shape.rotary_dim} must be even and at most the head's {shape.head_dim}"
                )
            if run.attends and shape.window < -1:
                refuse(
                    run.letter, f"windows={shape.window} must be -1 (all) or how many positions to the left are seen"
                )
            inner = shape.expand * shape.width
            if not run.attends and inner % shape.ssm_head_dim:
                refuse(
                    run.letter,
                    f"expand * width = {inner} is not a multiple of ssm_head_dim={shape.ssm_head_dim}; "
                    f"nearest width: {_nearest(shape.width, shape.ssm_head_dim, shape.expand)}",
                )

    def _check_chunking(self, stages: int) -> None:
        for name in ("chunkers", "ratio_targets"):
            if stages:
                self._check_count(name, stages, required=True)
        for stage in range(stages):
            chunker, target = self.chunker(stage), self.target(stage)
            if chunker not in CHUNKERS:
                raise RecipeError(f"model.hnet.chunkers: {chunker!r} at stage {stage}; there are {', '.join(CHUNKERS)}")
            if chunker in ("space", "words") and stage:
                raise RecipeError(f"model.hnet.chunkers: {chunker} reads bytes, so it is for stage 0, not {stage}")
            if target <= 1:
                raise RecipeError(f"model.hnet.ratio_targets={target:g} at stage {stage}: must be above 1")
            if chunker == "stride" and target != int(target):
                raise RecipeError(f"model.hnet.ratio_targets={target:g} at stage {stage}: a stride is a whole number")
        steps = self.capacity_steps
        if any(b <= a for a, b in zip((0, *steps), steps, strict=False)):
            raise RecipeError(f"model.hnet.capacity_steps={','.join(map(str, steps))}: must rise, from above 0")
        wanted = stages * (len(steps) + 1)
        if (self.capacities or steps) and len(self.capacities) != wanted:
            raise RecipeError(
                f"model.hnet.capacities has {len(self.capacities)} numbers; {stages} chunking stages in "
                f"{len(steps) + 1} phases (model.hnet.capacity_steps) need {wanted}"
            )
        for i, fraction in enumerate(self.capacities):
            if not 0 < fraction <= 1:
                raise RecipeError(
                    f"model.hnet.capacities={fraction:g} at stage {i % stages}: must be above 0 and at most 1 "
                    f"(about 1.5 / {self.target(i % stages):g} = {1.5 / self.target(i % stages):.2f} once trained; "
                    "at the start routers keep 0.35 to 0.75)"
                )
        if self.ratio_coefficient < 0 or self.flip_temperature < 0:
            raise RecipeError("model.hnet.ratio_coefficient and flip_temperature must be at least 0")


_PER_STAGE = (
    "widths", "intermediates", "heads", "rotary_dims", "windows", "expand", "d_state", "d_conv", "ssm_head_dim",
    "ssm_block",
)  # fmt: skip


def _at(values: tuple[Any, ...], stage: int) -> Any:
    """A stage's own of one value per stage, or the single one of all; 0 where none is given."""
    return 0 if not values else values[stage] if len(values) > 1 else values[0]


def _nearest(width: int, head_dim: int, expand: int) -> int:
    fits = (w for w in range(1, 2 * width + head_dim) if expand * w % head_dim == 0)
    return min(fits, key=lambda w: abs(w - width))
