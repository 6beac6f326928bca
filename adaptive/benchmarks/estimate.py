"""How long a train step should take on a machine, by arithmetic: an estimate, which nobody measured.

A step is cut into parts, each bound by matmuls or by the memory, and their times are added: nothing overlaps but what
stands in one part. Communication between devices is left out. What the arithmetic assumes is in the two tables below,
where each number has its source; everything else is counted from the recipe (`adaptive.account`).
"""

import dataclasses
import math
from typing import NamedTuple

from adaptive.account import account, parameters
from adaptive.layers.cost import Cost, Span
from adaptive.objectives.cross_entropy import chunk_length
from adaptive.parallel.mesh import axis_sizes
from adaptive.peaks import peak_of
from adaptive.recipe import Recipe
from adaptive.settings import nodes
from adaptive.targets import TARGETS


class Rates(NamedTuple):
    """What a kind of device reaches of its data sheet.

    matmul     share of the matmul peak that projections and feed-forwards reach
    attention  the same of attention kernels, over the pairs that are attended, heads of 64
    memory     share of the memory's bandwidth
    source     where the shares are from
    """

    matmul: float
    attention: float
    memory: float
    source: str


_H200 = "8192^3 bfloat16 matmul and copy of such a machine: 780 TFLOP/s, 4.3 TB/s; 75 % and 45 % of the former"
RATES = {
    "v5e": Rates(0.62, 0.30, 0.85, "assumed: published training runs of dense models"),
    "v5p": Rates(0.65, 0.30, 0.85, "assumed: published training runs of dense models"),
    "v6e": Rates(0.60, 0.25, 0.85, "assumed: near v5e's, a wider array is harder to fill"),
    "v7x": Rates(0.60, 0.25, 0.85, "assumed: as v6e"),
    "h200": Rates(0.59, 0.355, 0.90, _H200),
}


class Bytes(NamedTuple):
    """Bytes that go through memory, and matmuls that are done again."""

    # Of attention whose scores are written, per score: float32 written and read twice, probabilities read (compiled
    # for v5e: 16 forward, 20 when computed again, 14 backward).
    score_forward: float = 16
    score_again: float = 20
    score_backward: float = 14
    # Of a scan by blocks in XLA, per pair of positions of a block and head: decays and scores in float32.
    pair_forward: float = 16
    pair_backward: float = 40
    # Numbers that are read or written in the compute dtype by norms, rotary positions, residual sums (per width), the
    # gated activation (per hidden unit) and the gates and convolution of a scan (per inner channel), in each pass.
    per_width: float = 6
    per_hidden: float = 3
    per_inner: float = 8
    # Of a recursion over selected positions: rows gathered and scattered, forward and backward, of all positions.
    per_routed: float = 7
    routed_share: float = 0.15  # of the bandwidth that gathers of rows reach: a guess
    # Of the loss, per logit (float32 written, read; gradient in the compute dtype written, read), and per entry of the
    # head for every chunk: twice read in the compute dtype, its float32 gradient read and written.
    logit: float = 12
    head: float = 12
    # AdamW: parameter, gradient and two moments read, three written, float32.
    parameter: float = 28
    # A flash kernel's backward pass does five matmuls for the forward pass's two.
    flash_backward: float = 2.5


BYTES = Bytes()
SCAN_BLOCK = 64  # positions of a block, of a scan in XLA
COMPUTE = 2  # bytes of a bfloat16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step's parts on one device, and the useful FLOPs over what the peak would do meanwhile."""

    matmuls: float
    attention: float
    scan: float
    head: float
    elementwise: float
    routing: float
    optimizer: float
    utilisation: float

    @property
    def step(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("matmuls", "attention", "scan", "head", "elementwise", "routing", "optimizer")


def estimate(recipe: Recipe, target: str, devices: int) -> Estimate:
    """Of a recipe's step over so many devices of a target, in bfloat16; train.kernels says whether scores are written
    and scans are XLA's."""
    model, seq = recipe.model, recipe.data.seq_len
    remat = "none" if recipe.train.remat == "auto" else recipe.train.remat
    rows = recipe.train.batch_size / devices
    rates, chip = RATES[target], TARGETS[target]
    peak = peak_of(chip.kind, "bfloat16").flops
    assert peak is not None
    flops, memory = peak * rates.matmul, chip.bandwidth * rates.memory
    cost, again = account(model, seq), remat == "layer"
    stages, head = cost.stages[:-1], cost.stages[-1]
    by_kernel = recipe.train.kernels != "reference"
    if by_kernel:
        # What remat "attention" keeps of our kernels' attention, cuDNN keeps to itself.
        attends_again = again or remat == "dots" or (remat == "attention" and target == "h200")
        attended = sum(stage.attention_useful for stage in stages) * (1 + BYTES.flash_backward + attends_again)
        attention = attended / (peak * rates.attention)
        scanned = sum(3 * stage.state_space_useful + stage.state_space_again for stage in stages)
        scan = scanned / (peak * rates.attention)
    else:
        each = BYTES.score_forward + BYTES.score_backward + BYTES.score_again * (remat != "none")
        attention = sum(stage.attention for stage in stages) / (4 * head_dim(recipe)) * each / memory
        each = BYTES.pair_backward + BYTES.pair_forward * (1 + (remat != "none"))
        scan = sum(scanned_pairs(recipe, stage) for stage in stages) * each / memory
    dense = sum(map(_dense, stages)) * (3 + again)
    passes, width = 2 + again, model.body.widths(model.width)[-1]
    moved = sum(_elementwise(recipe, stage) for stage in stages) * passes * COMPUTE
    routed = sum(stage.recursion > 0 for stage in stages) * seq * width * BYTES.per_routed * COMPUTE
    step = Estimate(
        matmuls=rows * dense / flops,
        attention=rows * attention,
        scan=rows * scan,
        head=max(3 * rows * head.head / flops, _head_bytes(recipe, rows, chip.kind) / memory),
        elementwise=rows * moved / memory,
        routing=rows * routed / (chip.bandwidth * BYTES.routed_share),
        optimizer=BYTES.parameter * parameters(model).total / _holders(recipe, devices) / memory,
        utilisation=0.0,
    )
    useful = rows * seq * cost.train_flops_per_token
    return dataclasses.replace(step, utilisation=useful / (step.step * peak))


def _holders(recipe: Recipe, devices: int) -> int:
    """Devices that share one copy of the parameters."""
    sizes = axis_sizes(recipe.mesh, devices)
    return math.prod(sizes[axis] for axis in ("fsdp", "expert", "tensor", "stage"))


def head_dim(recipe: Recipe) -> int:
    """Channels of a head of attention; the fewest where there are several kinds."""
    found = [node.head_dim for _, node in nodes(recipe.model, "model") if hasattr(node, "kv_heads")]
    return min(found, default=64)


def scanned_pairs(recipe: Recipe, stage: Cost) -> float:
    """Pairs of positions within the blocks of a stage's scans, of one row, over heads and layers."""
    if not stage.state_space:
        return 0.0
    scan = next(node for _, node in nodes(recipe.model, "model") if hasattr(node, "d_state"))
    return _scanned_positions(recipe, stage) * SCAN_BLOCK * scan.heads(_width(recipe, stage))


def _scanned_positions(recipe: Recipe, stage: Cost) -> float:
    """Positions that the scans of a stage read, of one row, over layers: its projections tell how many layers."""
    scan = next(node for _, node in nodes(recipe.model, "model") if hasattr(node, "d_state"))
    one = scan.cost(_width(recipe, stage), Span.whole(stage.tokens))
    return stage.tokens * stage.state_space / one.state_space


def _dense(stage: Cost) -> float:
    """Forward FLOPs that are neither attention's nor a scan's."""
    return stage.projections + stage.feed_forward + stage.router


def _elementwise(recipe: Recipe, stage: Cost) -> float:
    """Numbers that pass through memory beside matmuls, of one row and pass."""
    width = _width(recipe, stage)
    hidden = stage.feed_forward / (6 * width)  # over positions and layers: three matrices each
    inner = 0.0
    if stage.state_space:
        scan = next(node for _, node in nodes(recipe.model, "model") if hasattr(node, "d_state"))
        inner = _scanned_positions(recipe, stage) * scan.expand * width
    whole = stage.tokens * stage.layers * width
    return BYTES.per_width * whole + BYTES.per_hidden * hidden + BYTES.per_inner * inner


def _width(recipe: Recipe, stage: Cost) -> int:
    """Of the stream that a stage computes: an H-Net's stages end with their number."""
    widths = recipe.model.body.widths(recipe.model.width)
    name, _, number = stage.name.rpartition(" ")
    return widths[int(number)] if name in ("encoder", "decoder", "chunking") else widths[-1]


def _head_bytes(recipe: Recipe, rows: float, kind: str) -> float:
    """That the loss moves on a device: logits, and the head for every chunk of positions."""
    model, seq = recipe.model, recipe.data.seq_len
    chunk = recipe.train.loss_chunk or chunk_length(seq, max(1, int(rows)), model.vocab_size, kind)
    table = model.vocab_size * model.width
    return BYTES.logit * rows * seq * model.vocab_size + BYTES.head * table * seq / chunk
