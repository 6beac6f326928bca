"""The state space recurrence of Mamba-2, one position after another: the specification of every implementation.

Transformers are SSMs (Dao and Gu 2024), section 5, with one group of B and C; sums are float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.ssd.blocks import accumulator


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    segments: jax.Array | None = None,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y [batch, seq, heads, dim] and the final state [batch, heads, dim, n]; arguments as for `kernels_pallas.ssd.ssd`.

    state_t = exp(dt_t a) state_{t-1} + dt_t x_t b_t^T and y_t = state_t c_t, where state_{t-1} is 0 for the first
    position of a segment.
    """
    (batch, seq, heads, dim), kind = x.shape, accumulator(x)
    if state is None:
        state = jnp.zeros((batch, heads, dim, b.shape[-1]), kind)
    stays = jnp.ones((batch, seq), bool)
    if segments is not None:
        stays = stays.at[:, 1:].set(segments[:, 1:] == segments[:, :-1])

    def body(state: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, stays = at
        y, state = step(x, dt, a, b, c, jnp.where(stays[:, None, None, None], state, 0))
        return state, y

    by_time = tuple(jnp.moveaxis(value, 1, 0) for value in (x, dt, b, c, stays))
    final, y = lax.scan(body, state.astype(kind), by_time)
    return jnp.moveaxis(y, 0, 1), final


def step(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One position: x [batch, heads, dim], dt [batch, heads], b and c [batch, n] -> (y like x, the new state)."""
    kind = accumulator(x)
    dt = dt.astype(kind)
    decay = jnp.exp(dt * a.astype(kind))
    written = (dt[..., None] * x.astype(kind))[..., None] * b.astype(kind)[:, None, None, :]
    state = decay[..., None, None] * state + written
    y = (state * c.astype(kind)[:, None, None, :]).sum(-1)
    return y.astype(x.dtype), state
