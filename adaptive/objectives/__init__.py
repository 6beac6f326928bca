"""Objectives: what is minimised, and how evaluation reads it. One file each, found by its name, with a dataclass
`Settings` below `Objective`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from adaptive.layers.reach import Reach
from adaptive.routing.types import Output
from adaptive.settings import Member


class Standing(NamedTuple):
    """How positions stand that a model reads, where not as the batch says: arguments of the model.

    positions, segment_ids, boundaries  [batch, n], as of a `Batch`
    reach  what each position sees; None: as the objective says
    """

    positions: jax.Array
    segment_ids: jax.Array
    boundaries: jax.Array | None = None
    reach: Reach | None = None


class Inputs(NamedTuple):
    """What a model is given of a batch and what it is to predict.

    tokens   i32[batch, n] that the model reads; batch may be a multiple of the batch's rows
    targets  i32[batch, seq], each predicted at one of the last seq positions
    weights  f32[batch, seq] of each target in the sum
    taught   what a teacher expects there; None: there is none
    mask_ratio  f32[batch]: share of each row's tokens that are hidden, exactly; None: nothing is
    standing  how the positions stand; None: as the batch says
    counted  f32[batch, seq]: targets that the loss is a mean over; None: `weights`
    before   i32[batch, seq]: the token before each target; None: those at `tokens`
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    taught: Any = None
    mask_ratio: jax.Array | None = None
    standing: Standing | None = None
    counted: jax.Array | None = None
    before: jax.Array | None = None


class Denoising(NamedTuple):
    """What decoding needs to know of a model that fills in hidden tokens.

    mask_id   the token that stands for a hidden one
    block     0: every position sees all others (`sees="all"` of a model); else positions see earlier blocks of so many
              and their own block whole (`sees=block`)
    shifted   whether what is said at a position is the token after it, as of next-token models
    """

    mask_id: int
    block: int
    shifted: bool


class Loss(NamedTuple):
    """total f32[]: the sum over targets, further predictions included; main f32[]: without them; nll f32[batch, seq]:
    of each position, in nats; apart: sums of further predictions by name."""

    total: jax.Array
    main: jax.Array
    nll: jax.Array
    apart: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective(Member):
    """Settings of an objective, and what it does: it has no parameters. A batch is `adaptive.data.batch.Batch`.

    causal       whether the model may see the past alone
    noisy        whether evaluation draws noise, so that several draws tell more than one
    """

    door: ClassVar[str] = __name__
    causal: ClassVar[bool] = True
    noisy: ClassVar[bool] = False

    def check(self, vocab: int) -> None:
        """Raises RecipeError for settings that cannot work with so many tokens."""

    def check_model(self, model: Any) -> None:
        """Raises RecipeError for a model, by its settings, that this cannot train."""

    def denoising(self) -> Denoising | None:
        """How a model trained with it decodes; None: it predicts the next token."""
        return None

    @property
    def fills_in(self) -> bool:
        """Whether a model trained with it writes by filling in hidden tokens alone."""
        return self.denoising() is not None and bool(self.refuse_generation())

    def refuse_generation(self) -> str:
        """Why a model trained with it does not generate token after token; empty where it does."""
        if self.causal:
            return ""
        how = ": adaptive generate writes with it (docs/diffusion.md)" if self.denoising() else ""
        return (
            f"it was trained with objective={self.kind()}, which fills in hidden tokens and predicts no next one{how}"
        )

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        """What to read and to predict in training; key: of noise."""
        raise NotImplementedError

    def held_out(self, batch: Any, key: jax.Array | None) -> Inputs:
        """The same in evaluation, where the loss of `inputs` is not what should be measured."""
        return self.inputs(batch, key)

    def forward_flops(self, stages: Sequence[Any]) -> float:
        """Of one row, from the costs of a model's stretches (`adaptive.layers.cost.Cost`)."""
        return float(sum(stage.useful for stage in stages))

    @property
    def readings(self) -> int:
        """How often training reads a row."""
        return 1

    def count(self, batch: Any) -> jax.Array:
        """f32[]: how many targets the loss of a batch is divided by, at least 1."""
        raise NotImplementedError

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        """The loss of a pass; chunk: positions whose logits exist at once, 0: chosen for vocabulary and device."""
        raise NotImplementedError


def asked(aim: Objective, inputs: Inputs, batch: Any, *, segmented: bool) -> dict[str, Any]:
    """Arguments of a model's pass over what an objective has it read.

    segmented  False: each row is one document, whatever the batch says
    """
    found = inputs.standing or Standing(batch.positions, batch.segment_ids, batch.boundaries)
    return {
        "positions": found.positions,
        "segment_ids": found.segment_ids if segmented else None,
        "boundaries": found.boundaries,
        "reach": found.reach,
        "sees": "past" if aim.causal else "all",
        "mask_ratio": inputs.mask_ratio,
    }
