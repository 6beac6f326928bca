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
        for outer in reversed(stages[:depth]):
            indices, valid = outer.selection.indices, outer.selection.valid
            held = mask.reshape(valid.shape) & valid
            known = jnp.where(valid, prob.reshape(valid.shape), jnp.nan)
            mask = scatter(jnp.zeros(outer.boundary_mask.shape, bool), indices, held)
            prob = scatter(jnp.full(outer.boundary_prob.shape, jnp.nan, known.dtype), indices, known)
        views.append(StageView(mask.reshape(shape), prob.reshape(shape)))
    return tuple(views)
