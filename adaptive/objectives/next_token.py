"""Next-token prediction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.objectives import Inputs, Loss, Objective
from adaptive.objectives.cross_entropy import chunk_length, cross_entropy_sum
from adaptive.parallel.rules import batch_shards, constrain, device_kind, narrowed, seq_shards
from adaptive.routing.types import Output


@dataclasses.dataclass(frozen=True)
class Settings(Objective):
    """Cross entropy of every token given those before it in its document."""

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        return Inputs(batch.tokens, batch.targets, batch.mask)

    def count(self, batch: Any) -> jax.Array:
        return jnp.maximum(batch.mask.sum(), 1.0)

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        return weighted_loss(model, out, inputs, chunk)


def weighted_loss(model: Any, out: Output, inputs: Inputs, chunk: int, never: int = -1) -> Loss:
    """Sums of the weighted cross entropy at the last positions of a pass, as many as there are targets, and of further
    predictions there.

    never  a token that is never predicted; -1: there is none
    """
    rows, seq = inputs.targets.shape
    weight = narrowed(model.head_weight(), out.hidden.dtype)
    parts = seq_shards()
    chunk = chunk or chunk_length(seq // parts, rows // batch_shards(), weight.shape[0], device_kind())
    cap = model.settings.logit_soft_cap

    def summed(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        if hidden.shape[1] > seq:
            hidden = constrain(hidden[:, -seq:], "batch", "seq", None)
        return cross_entropy_sum(hidden, weight, inputs.targets, inputs.weights, chunk, cap, never)

    main, nll = summed(out.hidden)
    total, apart = main, {}
    for readout in out.readouts:
        apart[readout.name], _ = summed(readout.hidden)
        total = total + readout.coefficient * apart[readout.name]
    return Loss(total, main, nll, apart)
