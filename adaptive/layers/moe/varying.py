"""What routers share whose tokens take different numbers of experts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.layers.moe.base import Context, statistics
from adaptive.layers.moe.choosing import present_pairs
from adaptive.layers.moe.settings import Execution, MoESettings
from adaptive.routing.balance import claims
from adaptive.routing.dispatch import Dispatch, by_mask, by_token
from adaptive.routing.masked import softmax_over
from kernels_pallas.selection import top_mask


class Counted(NamedTuple):
    """A dispatch, the pairs f32[experts] that the router claims, and the layer's statistics."""

    dispatch: Dispatch
    load: jax.Array
    stats: dict[str, jax.Array]


def by_rank(
    config: MoESettings,
    logits: jax.Array,
    index: jax.Array,
    wanted: jax.Array,
    limit: jax.Array | int,
    most: int,
    context: Context,
    *,
    claims_all: bool,
) -> Counted:
    """The first `limit` of the wanted experts of each token, weighted by the softmax over those.

    logits f32[batch, seq, experts]; index i32[batch, seq, experts], all experts, best first; wanted bool alike, the
    leading ones of each token; most: the static bound of `limit`. stats gain truncated f32[], the pairs beyond the
    limit. claims_all: those are dropped pairs too, and not beyond what the router claims.
    """
    wanted = context.wanted(index, present_pairs(index, context.present) & wanted)
    within = jnp.arange(config.experts) < (most if context.replayed is not None else limit)
    valid = (wanted & within)[..., :most]
    weights = softmax_over(jnp.take_along_axis(logits, index, axis=-1)[..., :most], valid)
    dispatch = by_token(index[..., :most], weights, valid, config.experts)
    load = claims(index, wanted, config.experts).sum(0) if claims_all else dispatch.load()
    stats = statistics(dispatch, logits, load, context.present)
    stats["truncated"] = (wanted.sum() - valid.sum()).astype(jnp.float32)
    return Counted(dispatch, load, stats)


def by_weight(
    config: MoESettings, logits: jax.Array, weights: jax.Array, active: jax.Array, slack: float, context: Context
) -> Counted:
    """All active experts of each token; where `slack` is above 0, and not under "threshold" selection, at most
    `slack * experts_per_token` of a sequence's pairs per token, the smallest weights beyond dropped.

    logits, weights f32 and active bool, all [batch, seq, experts].
    """
    active = present_pairs(active, context.present) & active
    active = active if context.replayed is None else context.replayed
    kept, bounds = active, {}
    if slack and context.selection == "topk":
        rows = min(active[0].size, math.ceil(round(active.shape[1] * config.router.per_token() * slack, 9)))
        kept, bounds = within_rows(weights, active, rows), {"pairs_per_sequence": rows}
    dispatch = by_mask(kept, weights, **bounds)
    load = active.sum((0, 1)).astype(jnp.float32)
    return Counted(dispatch, load, statistics(dispatch, logits, load, context.present))


def how_computed(config: MoESettings, slack: float, context: Context) -> Execution:
    """Rows where `by_weight` bounds their number, else every expert on every token: slots would be as many."""
    if config.execution != "auto":
        return config.execution
    return "ragged" if slack and context.selection == "topk" else "dense"


def within_rows(weights: jax.Array, active: jax.Array, rows: int) -> jax.Array:
    """bool[batch, seq, experts]: the `rows` active pairs of each sequence with the largest weights, ties to the earlier
    token."""
    flat = jnp.where(active, jax.lax.stop_gradient(weights), -jnp.inf).reshape(len(weights), -1)
    return top_mask(flat, rows).reshape(active.shape) & active


def one_expert(setting: str) -> str:
    """Why weights that are divided by their sum teach a router nothing where each token has one expert."""
    return f"with router.{setting} a normalised weight is always 1 and the router learns nothing: allow 2"
