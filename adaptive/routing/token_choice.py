"""Token choice over depth: each token decides once how many recursions it takes (MoR paper, section 2.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.routing.losses import balancing_loss, counts_of, router_z_loss
from adaptive.routing.types import Summed


class Depths(NamedTuple):
    """depth i32[batch, seq] in 0..choices-1 (i means i+1 passes), gate f32[batch, seq], tokens f32[choices] of each,
    losses "balancing_loss" and "z_loss", scalars "max_vio", "entropy" and the share of each depth."""

    depth: jax.Array
    gate: jax.Array
    tokens: jax.Array
    losses: dict[str, Summed]
    scalars: dict[str, jax.Array]


def decide(
    logits: jax.Array,
    probabilities: jax.Array,
    bias: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    full_depth: jax.Array | bool = False,
    depth: jax.Array | None = None,
) -> Depths:
    """The depth of each token: argmax(probability + bias), gated by the unbiased probability.

    logits, probabilities  f32[batch, seq, choices]
    bias                   f32[choices] of loss-free balancing; None: none
    where                  bool[batch, seq]: tokens that count in the statistics; None: all
    full_depth             bool[]: every token takes every recursion (balance warm-up), and the bias is ignored
    depth                  i32[batch, seq], in place of what is decided; None: nothing
    """
    choices = logits.shape[-1]
    ranking = probabilities if bias is None else probabilities + jnp.where(full_depth, 0.0, bias)
    if depth is None:
        depth = jnp.where(full_depth, choices - 1, jnp.argmax(ranking, axis=-1)).astype(jnp.int32)
    gate = jnp.take_along_axis(probabilities, depth[..., None], axis=-1)[..., 0]
    tokens = counts_of(depth, choices, where)
    load = tokens / jnp.maximum(tokens.sum(), 1.0)
    losses = {
        "balancing_loss": balancing_loss(probabilities, depth, where),
        "z_loss": router_z_loss(logits, where),
    }
    scalars = {
        "max_vio": load.max() * choices - 1,  # (max load - mean load) / mean load
        "entropy": -jnp.sum(jnp.where(load > 0, load * jnp.log(jnp.maximum(load, 1e-30)), 0.0)),
        **{f"load_{i + 1}": load[i] for i in range(choices)},
    }
    return Depths(depth, gate, tokens, losses, scalars)
