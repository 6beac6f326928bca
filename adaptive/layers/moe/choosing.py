"""What routers share whose tokens choose their experts, or whose experts choose tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.settings import Limited, MoESettings
from adaptive.routing.capacity import keep_within


def jittered(x: jax.Array, jitter: float, context: Context) -> jax.Array:
    """x times uniform noise in training."""
    if not jitter or not context.training or context.key is None:
        return x
    return x * jax.random.uniform(context.key, x.shape, x.dtype, 1 - jitter, 1 + jitter)


def present_pairs(index: jax.Array, present: jax.Array | None) -> jax.Array:
    """bool, the shape of index [batch, seq, k]: pairs of tokens that exist."""
    everyone = jnp.ones(index.shape, bool)
    return everyone if present is None else everyone & present[..., None]


def grouped(a: jax.Array, whole: bool) -> jax.Array:
    """a [batch, seq, ...] as groups of tokens [groups, n, ...]: the sequences, or the `whole` batch as one."""
    return a.reshape(1, -1, *a.shape[2:]) if whole else a


def limited(
    config: MoESettings,
    index: jax.Array,
    weights: jax.Array,
    wanted: jax.Array,
    context: Context,
    best: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """(pairs bool[batch, seq, k] that find a slot, bounds of the Dispatch) under the router's capacity.

    Pairs of zero experts must not be among the wanted. best f32[batch, seq]: what drop=batch sorts tokens by; None:
    their largest weight. Slots are counted for the tokens that are present.
    """
    o = config.router
    assert isinstance(o, Limited)
    if not o.capacity_factor or context.selection == "threshold":
        return wanted, {}
    batch, seq, _ = index.shape
    whole = o.capacity_group == "batch"
    most = room = o.slots(config, batch * seq if whole else seq)
    if context.present is not None:
        room = o.slots(config, grouped(context.present, whole).sum(-1, dtype=jnp.int32))
    index, weights, pairs = (grouped(a, whole) for a in (index, weights, wanted))
    kept = keep_within(
        index, weights, pairs, room, config.experts, o.drop, None if best is None else grouped(best, whole)
    )
    return kept.reshape(wanted.shape), {"most_per_batch" if whole else "most_per_sequence": most}


def check_shared(config: MoESettings, at: str) -> None:
    """RecipeError where there is no shared feed-forward to scale to."""
    if not config.shared_size:
        raise RecipeError(f"{at}.router.scale_to_shared=true: needs {at}.shared_size above 0")


def shared_in_experts(config: MoESettings) -> float:
    """Width of the shared feed-forward in experts."""
    return config.shared_size / config.expert_size
