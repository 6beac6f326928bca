"""Computing a Dispatch: gather the rows, run the experts, add the weighted results."""

from typing import Literal

import jax
import jax.numpy as jnp

from adaptive.layers.moe.experts import Experts, Weights, ffn_rows, ffn_slots
from adaptive.routing.dispatch import Dispatch, RaggedRows, Slots, to_rows, to_slots

Execution = Literal["auto", "capacity", "ragged", "dense"]


def computed(experts: Experts, x: jax.Array, dispatch: Dispatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
    """(sum over experts of weight * FFN(x), f32[batch, seq, width]; pairs lost in communication, f32[]).

    capacity  static slots for the most tokens an expert can have: exact FLOPs for expert choice and capacities
    ragged    rows sorted by expert: no padding, whatever the load
    dense     every expert on every token: the reference
    auto      capacity where the slots are about as many as the pairs, ragged otherwise
    """
    weights = experts.weights(x.dtype)
    batch, seq, width = x.shape
    y = local_output(weights, x.reshape(-1, width), dispatch, execution, experts.activation)
    return y.reshape(batch, seq, width), jnp.zeros(())


def local_output(weights: Weights, x: jax.Array, dispatch: Dispatch, execution: Execution, activation: str) -> jax.Array:
    """f32[tokens, width] of one device's tokens x [tokens, width]."""
    match chosen(dispatch, execution):
        case "capacity":
            slots = to_slots(dispatch)
            return combine_slots(ffn_slots(weights, x[slots.tokens], activation), slots, len(x))
        case "ragged":
            rows = to_rows(dispatch)
            return combine_rows(ffn_rows(weights, x[rows.tokens], rows.group_sizes, activation), rows, dispatch, len(x))
        case _:
            everyone = jnp.broadcast_to(x, (dispatch.experts, *x.shape))
            dense = dispatch.combine_matrix()[:, : dispatch.experts]
            return jnp.einsum("etd,te->td", ffn_slots(weights, everyone, activation).astype(jnp.float32), dense)


def chosen(dispatch: Dispatch, execution: Execution) -> Literal["capacity", "ragged", "dense"]:
    """What "auto" means for a dispatch: capacity where padding is at most half of the pairs."""
    if execution != "auto":
        return execution
    if dispatch.by == "expert":
        return "capacity"
    pairs = dispatch.index.size
    return "capacity" if dispatch.experts * dispatch.capacity(dispatch.batch) <= 1.5 * pairs else "ragged"


def combine_slots(out: jax.Array, slots: Slots, tokens: int) -> jax.Array:
    """Rows [experts, capacity, width] added, weighted, to f32[tokens, width]."""
    weighted = out.astype(jnp.float32) * slots.weights[..., None]
    zeros = jnp.zeros((tokens, out.shape[-1]), jnp.float32)
    return zeros.at[slots.tokens.reshape(-1)].add(weighted.reshape(-1, out.shape[-1]))


def combine_rows(out: jax.Array, rows: RaggedRows, dispatch: Dispatch, tokens: int) -> jax.Array:
    """Rows [n, width] added, weighted, to f32[tokens, width]; token-major pairs are gathered, so the order of addition
    is fixed."""
    if rows.place is None:
        weighted = out.astype(jnp.float32) * rows.weights[:, None]
        return jnp.zeros((tokens, out.shape[-1]), jnp.float32).at[rows.tokens].add(weighted)
    weights = jnp.where(dispatch.valid, dispatch.weights, 0.0).reshape(tokens, -1)
    place = jnp.minimum(rows.place, len(out) - 1)
    return jnp.einsum("tkd,tk->td", out[place].astype(jnp.float32), weights)
