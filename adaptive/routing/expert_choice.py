"""Expert choice over depth: each recursion picks the positions it computes (MoR paper, section 2.2)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.routing.losses import mean_over, router_z_loss, sampling_loss
from adaptive.routing.rows import membership
from adaptive.routing.scores import passes
from adaptive.routing.select import select_top
from adaptive.routing.types import Selection, Summed


class Choice(NamedTuple):
    """One recursion's decision among its candidates.

    selection  among the candidates: indices count candidates, not positions of the row
    losses     "aux_loss", "z_loss", before their coefficients
    scalars    "accuracy" (share of candidates whose causal decision agrees with top-k), "gate" (mean weight)
    """

    selection: Selection
    losses: dict[str, Summed]
    scalars: dict[str, jax.Array]


def capacity_limit(fraction: float, seq_len: int, step: jax.Array, warmup_steps: int) -> jax.Array:
    """Positions i32[] a recursion may take at training step `step` (from 0) during a capacity warm-up.

    c(t) = c + (1 - c) * (1 + cos(pi * min(1, t / warmup))) / 2 at t = step + 1, then max(1, int(c(t) * seq_len))
    (released code, expert_choice_router.py; it counts forward passes, here a step counts once).
    """
    limits = [max(1, int(_warm(fraction, t / warmup_steps) * seq_len)) for t in range(1, warmup_steps + 1)]
    return jnp.asarray(limits, jnp.int32)[jnp.minimum(step, warmup_steps - 1)]


def limit_of_counts(fraction: float, counts: jax.Array, seq_len: int, warming: jax.Array | None) -> jax.Array:
    """Positions i32[batch, 1] a recursion may take of rows of which `counts` i32[batch] of `seq_len` positions exist.

    `max(1, int(fraction * count))`, as of a row of that length; during a warm-up the limit of a whole row, scaled.
    """
    if warming is not None:
        return jnp.maximum(1, warming * counts // seq_len)[:, None]
    limits = [max(1, int(fraction * count)) for count in range(seq_len + 1)]
    return jnp.asarray(limits, jnp.int32)[counts][:, None]


def _warm(fraction: float, progress: float) -> float:
    # In double precision ahead of the step: float32 would round some limits down to the next integer.
    return fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def choose(
    logits: jax.Array,
    gates: jax.Array,
    capacity: int,
    *,
    ranking: jax.Array | None = None,
    decision: jax.Array | None = None,
    candidates: jax.Array | None = None,
    limit: jax.Array | None = None,
    select: Callable[..., Selection] = select_top,
) -> Choice:
    """Top-k among the candidates of one recursion.

    logits      f32[batch, n]   main router
    gates       f32[batch, n]   weights, as activated
    ranking     f32[batch, n]   what top-k ranks; None: the logits, which saturate later than the activated scores
    decision    f32[batch, n]   logits that learn the decision by binary cross entropy; None: the main router's
    candidates  bool[batch, n]  None: all
    select      `select_top`, of rows that may be split
    """
    ranking = logits if ranking is None else ranking
    decision = logits if decision is None else decision
    if candidates is not None:
        ranking = jnp.where(candidates, ranking, -jnp.inf)
    selection = select(ranking, gates, capacity, limit)
    chosen = chosen_of(selection, logits.shape[-1])
    losses = {
        "aux_loss": sampling_loss(decision, chosen, candidates),
        "z_loss": router_z_loss(logits[..., None], candidates),
    }
    scalars = {
        "accuracy": mean_over((passes(decision) == chosen).astype(jnp.float32), candidates),
        "gate": mean_over(selection.weights, selection.valid),
    }
    return Choice(selection, losses, scalars)


def chosen_of(selection: Selection, n: int) -> jax.Array:
    """bool[batch, n]: which of n candidates the selection holds."""
    if selection.indices.shape[-1] == n:
        return selection.valid  # ascending and unique: slot i is candidate i
    return membership(selection, n)
