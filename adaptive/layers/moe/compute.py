"""Computing a Dispatch: gather the rows, run the experts, add the weighted results."""

import jax
import jax.numpy as jnp

from adaptive.layers.moe.experts import FeedForward, Matrices, Weights, activated
from adaptive.layers.moe.settings import Execution
from adaptive.parallel import experts as expert_parallel
from adaptive.routing.dispatch import Dispatch, RaggedRows, Slots, to_rows, to_slots

MOST_PADDING = 1.5  # slots over pairs up to which "auto" takes slots


def computed(experts: Matrices, x: jax.Array, dispatch: Dispatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
    """(sum over experts of weight * FFN(x), f32[batch, seq, width]; pairs lost in communication, f32[]).

    capacity  static slots for the most tokens an expert can have: exact FLOPs for expert choice and capacities
    ragged    rows sorted by expert: no padding, whatever the load
    dense     every expert on every token: the reference
    auto      capacity where slots are at most half again as many as the pairs, ragged otherwise
    """
    weights = experts.weights(x.dtype)
    if execution == "dense":
        return _dense(weights, experts.activation, x, dispatch), jnp.zeros((), jnp.float32)

    arrange = lambda d: _arranged(d, execution)  # noqa: E731
    return expert_parallel.run(x, dispatch, weights, experts.axes(), arrange, FeedForward(experts.activation))


def _arranged(dispatch: Dispatch, execution: Execution) -> Slots | RaggedRows:
    if execution == "auto":
        slots = dispatch.experts * dispatch.capacity(dispatch.batch)
        pairs = dispatch.batch * dispatch.pairs_per_sequence
        execution = "capacity" if dispatch.by == "expert" or slots <= MOST_PADDING * pairs else "ragged"
    return to_slots(dispatch) if execution == "capacity" else to_rows(dispatch)


def _dense(weights: Weights, activation: str, x: jax.Array, dispatch: Dispatch) -> jax.Array:
    # Hidden units are weighted, not outputs, so no array is wider than all experts' hidden units (as BlockFFN trains).
    named = {name: jnp.einsum("bsd,edf->bsef", x, weights[name]) for name in ("up", "gate") if name in weights}
    combine = dispatch.combine_matrix()[:, : dispatch.experts].reshape(*x.shape[:2], -1, 1)
    hidden = activated(named["up"], named.get("gate"), activation).astype(jnp.float32) * combine
    down = weights["down"]
    return jnp.einsum("bsef,efd->bsd", hidden.astype(down.dtype), down, preferred_element_type=jnp.float32)
