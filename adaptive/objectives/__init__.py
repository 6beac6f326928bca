"""Objectives: what is minimised, and how evaluation reads it. One file each, found by its name, with a dataclass
`Settings` below `Objective`."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from adaptive.routing.types import Output
from adaptive.settings import Member


class Inputs(NamedTuple):
    """What a model is given of a batch and what it is to predict.

    tokens   i32[batch, seq] that the model reads
    targets  i32[batch, seq], each predicted at its position
    weights  f32[batch, seq] of each target in the sum
    taught   what a teacher expects there; None: there is none
    mask_ratio  f32[batch]: share of each row's tokens that are hidden, exactly; None: nothing is
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    taught: Any = None
    mask_ratio: jax.Array | None = None


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
    cost_factor  forward passes per token of the batch
    """

    door: ClassVar[str] = __name__
    causal: ClassVar[bool] = True
    cost_factor: ClassVar[float] = 1.0

    def check(self, vocab: int) -> None:
        """Raises RecipeError for settings that cannot work with so many tokens."""

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        """What to read and to predict; key: of noise, in training and in evaluation."""
        raise NotImplementedError

    def count(self, batch: Any) -> jax.Array:
        """f32[]: how many targets the loss of a batch is divided by, at least 1."""
        raise NotImplementedError

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        """The loss of a pass; chunk: positions whose logits exist at once, 0: chosen for vocabulary and device."""
        raise NotImplementedError
