"""What nested chunking stages decided, told for every byte."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.routing.boundaries import scatter
from adaptive.routing.types import StageTrace


class StageView(NamedTuple):
    """One stage's decisions at the bytes that its positions begin with.

    mask  bool[batch, seq]  whether a chunk of this stage begins here; then one of every stage outside does as well
    prob  f32[batch, seq]   probability that one does, NaN at bytes that are no position of this stage
    """

    mask: jax.Array
    prob: jax.Array


def at_bytes(stages: Sequence[StageTrace], shape: tuple[int, ...]) -> tuple[StageView, ...]:
    """Each stage of a trace over bytes [batch, seq] of this shape; chunks packed by device are unpacked."""
    views = []
    for depth, stage in enumerate(stages):
        mask, prob = stage.boundary_mask & stage.valid, jnp.where(stage.valid, stage.boundary_prob, jnp.nan)
        mask, prob = outwards(stages[:depth], mask, False), outwards(stages[:depth], prob, jnp.nan)
        views.append(StageView(mask.reshape(shape), prob.reshape(shape)))
    return tuple(views)


def outwards(stages: Sequence[StageTrace], values: jax.Array, nothing: float | bool) -> jax.Array:
    """Values of the chunks that the last of `stages` passes on, at the positions of the first that they begin with, and
    `nothing` at all others. Without stages the values themselves."""
    for stage in reversed(stages):
        indices, valid = stage.selection.indices, stage.selection.valid
        held = jnp.where(valid, values.reshape(valid.shape), nothing)
        values = scatter(jnp.full(stage.boundary_mask.shape, nothing, held.dtype), indices, held)
    return values
