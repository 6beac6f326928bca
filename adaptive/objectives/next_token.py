"""Next-token prediction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.objectives import Inputs, Loss, Objective
from adaptive.objectives.cross_entropy import chunk_length, cross_entropy_sum
from adaptive.parallel.rules import batch_shards, device_kind, narrowed, seq_shards
from adaptive.routing.types import Output


@dataclasses.dataclass(frozen=True)
class Settings(Objective):
    """Cross entropy of every token given those before it in its document."""

    def inputs(self, batch: Any, key: jax.Array | None) -> Inputs:
        return Inputs(batch.tokens, batch.targets, batch.mask)

    def count(self, batch: Any) -> jax.Array:
        return jnp.maximum(batch.mask.sum(), 1.0)

    def loss(self, model: Any, out: Output, inputs: Inputs, chunk: int) -> Loss:
        rows, seq = inputs.tokens.shape
        weight = narrowed(model.head_weight(), out.hidden.dtype)
        parts = seq_shards()
        chunk = chunk or chunk_length(seq // parts, rows // batch_shards(), weight.shape[0], device_kind())
        cap = model.settings.logit_soft_cap
        main, nll = cross_entropy_sum(out.hidden, weight, inputs.targets, inputs.weights, chunk, cap)
        total, apart = main, {}
        for readout in out.readouts:
            apart[readout.name], _ = cross_entropy_sum(
                readout.hidden, weight, inputs.targets, inputs.weights, chunk, cap
            )
            total = total + readout.coefficient * apart[readout.name]
        return Loss(total, main, nll, apart)
