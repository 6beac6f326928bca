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
    if not jitter:
        return x
    draw = lambda key: jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)  # noqa: E731
    factors = context.drawn(context.noise.input, draw)
    return x if factors is None else x * jnp.asarray(factors, x.dtype)


def present_pairs(index: jax.Array, present: jax.Array | None) -> jax.Array:
    """bool, the shape of index [batch, seq, k]: pairs of tokens that exist."""
    everyone = jnp.ones(index.shape, bool)
    return everyone if present is None else everyone & present[..., None]


def mask_of(index: jax.Array, wanted: jax.Array, choices: int) -> jax.Array:
    """bool[batch, seq, choices] of choices i32[batch, seq, k], those that are wanted bool alike."""
    return ((index[..., None] == jnp.arange(choices)) & wanted[..., None]).any(-2)


def keeping(
    o: Limited,
    index: jax.Array,
    weights: jax.Array,
    pairs: jax.Array,
    room: jax.Array | int,
    choices: int,
    best: jax.Array | None = None,
) -> jax.Array:
    """bool[batch, seq, k]: which of `pairs` find a slot where each of the choices has `room` in every group.

    index i32, weights f32, pairs bool, all [batch, seq, k]; best f32[batch, seq], as `keep_within` has it. A group is a
    sequence or the batch; room is i32[groups] or one for all.
    """
    whole = o.capacity_group == "batch"
    turned = whole and o.drop == "position"  # tokens are numbered position by position
    group = lambda a: grouped(a.swapaxes(0, 1) if turned else a, whole)  # noqa: E731
    best = None if best is None else group(best)
    kept = keep_within(group(index), group(weights), group(pairs), room, choices, o.drop, best)
    batch, seq, k = pairs.shape
    return kept.reshape(seq, batch, k).swapaxes(0, 1) if turned else kept.reshape(batch, seq, k)


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
    if context.kept is None:
        kept = keeping(o, index, weights, wanted, room, config.experts, best)
    else:
        kept = wanted & jnp.take_along_axis(context.kept, jnp.minimum(index, config.experts - 1), axis=-1)
    return kept, {"most_per_batch" if whole else "most_per_sequence": most}


def check_shared(config: MoESettings, at: str) -> None:
    """RecipeError where there is no shared feed-forward to scale to."""
    if not config.shared_size:
        raise RecipeError(f"{at}.router.scale_to_shared=true: needs {at}.shared_size above 0")


def shared_in_experts(config: MoESettings) -> float:
    """Width of the shared feed-forward in experts."""
    return config.shared_size / config.expert_size
