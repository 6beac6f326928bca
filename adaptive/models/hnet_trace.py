"""What an H-Net's stages decided, gathered into auxiliary losses and one trace over the bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.models.hnet_config import HNetConfig
from adaptive.routing.boundaries import Boundaries, chunk_statistics, ratio_losses
from adaptive.routing.stages import outwards
from adaptive.routing.types import Aux, AuxLosses, Output, Selection, StageTrace, Trace


class StageRecord(NamedTuple):
    """One stage's decision about the positions [batch, n] that reached it; of packed rows, as they were packed."""

    found: Boundaries
    mask: jax.Array
    exists: jax.Array
    selection: Selection


def assemble(
    config: HNetConfig,
    records: Sequence[StageRecord],
    inner: Output | None,
    shape: tuple[int, ...],
    valid: jax.Array | None,
    shards: int,
) -> tuple[AuxLosses, Trace]:
    """Losses and trace of a pass over bytes [batch, seq] of this shape.

    inner   of the innermost network, over chunks; None where it is a stack
    valid   bool[batch, seq]: bytes that exist; None: all
    shards  devices that the batch is split over
    """
    aux = AuxLosses({} if inner is None else inner.aux)
    scalars: dict[str, jax.Array] = {}
    if inner is not None and inner.trace.scalars:
        scalars |= inner.trace.scalars
    for s, record in enumerate(records):
        stats = chunk_statistics(record.found, record.mask, record.exists)
        scalars |= {f"{name}_{s}": value for name, value in stats.items()}
        if config.learned(s):
            losses = ratio_losses(record.found, record.exists, config.target(s), shards)
            aux[f"ratio_loss_{s}"] = Aux(losses[config.ratio_over], config.ratio_coefficient)
            scalars |= {f"ratio_loss_{over}_{s}": value for over, value in losses.items()}
    stages = tuple(StageTrace(r.found.prob, r.mask, r.found.wanted & ~r.mask, r.exists, r.selection) for r in records)
    depth = _passes(stages, inner, shape) if stages else jnp.ones(shape, jnp.int32)
    count = depth.size if valid is None else jnp.maximum(valid.sum(), 1)
    if records:
        scalars["chunks_per_byte"] = records[-1].mask.sum() / count
    if "mean_depth" in scalars:
        scalars["mean_depth"] = depth.sum() / count  # passes per byte, where the inner network counts per chunk
    chunks = () if inner is None else inner.trace.scores
    scores = tuple(outwards(stages, a, jnp.nan).reshape(shape) for a in chunks)
    own = Trace(depth) if inner is None else inner.trace._replace(depth=depth, scores=scores)
    return aux, own._replace(scalars=scalars or None, stages=stages)


def _passes(stages: Sequence[StageTrace], inner: Output | None, shape: tuple[int, ...]) -> jax.Array:
    innermost = stages[-1].selection.valid
    depth = innermost.astype(jnp.int32) if inner is None else inner.trace.depth
    return outwards(stages, depth, 0).reshape(shape)
