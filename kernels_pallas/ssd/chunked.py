"""The state space recurrence by matmuls: dense within blocks of positions, a recurrence only between blocks.

Transformers are SSMs (Dao and Gu 2024), section 6. With l the running sum of dt * a within a block, position t reads
what position s <= t of its block wrote times exp(l_t - l_s), and what the carried state holds times exp(l_t). No
difference that is exponentiated is positive: later minus earlier, masked first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.ssd.reference import accumulator

Blocks = tuple[jax.Array, ...]


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    runs: jax.Array,
    state: jax.Array,
    *,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """y and the final state: `reference.ssd`, block after block.

    runs   i32[batch, seq], ascending from 0: the state restarts where it changes
    state  [batch, heads, dim, n]: belongs to run 0
    block  at most so many positions each; the blocks are equal and as few as that allows
    """
    seq, kind = x.shape[1], accumulator(x)
    size = block_of(seq, block)
    values = pad(size, x, dt.astype(kind), b, c, runs)
    log_decay = values[1] * a.astype(kind)
    blocks = tuple(_split(value, size) for value in (values[0], values[1], log_decay, *values[2:]))
    body = jax.checkpoint(one_block, prevent_cse=False)
    carry = state.astype(kind), jnp.zeros_like(runs[:, 0])
    (final, _), y = lax.scan(body, carry, blocks)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(x.shape[0], -1, *x.shape[2:])[:, :seq], final


def one_block(carry: tuple[jax.Array, jax.Array], at: Blocks) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The state and run after a block of q positions, and the block's y [batch, q, heads, dim].

    carry  the state before it, and i32[batch]: the run this belongs to
    at     x [batch, q, heads, dim], dt and dt * a [batch, q, heads], b and c [batch, q, n], runs [batch, q]
    """
    (state, run), (x, dt, log_decay, b, c, runs) = carry, at
    kind = state.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=kind)
    total = jnp.cumsum(log_decay, axis=1).transpose(0, 2, 1)  # [batch, heads, q]
    last = runs[:, -1]
    written = (x.astype(kind) * dt[..., None]).transpose(0, 2, 1, 3)  # [batch, heads, q, dim]

    q = x.shape[1]
    sees = jnp.tril(jnp.ones((q, q), bool)) & (runs[:, :, None] == runs[:, None, :])
    decay = jnp.exp(jnp.where(sees[:, None], total[..., :, None] - total[..., None, :], -jnp.inf))
    scores = dot("btn,bsn->bts", c, b)[:, None] * decay
    y = dot("bhts,bhsp->bhtp", scores.astype(x.dtype), written.astype(x.dtype))

    into = jnp.where((runs == run[:, None])[:, None], jnp.exp(total), 0)
    y += dot("btn,bhpn->bhtp", c.astype(kind), state) * into[..., None]

    out_of = jnp.where((runs == last[:, None])[:, None], jnp.exp(total[..., -1:] - total), 0)
    keeps = jnp.where((last == run)[:, None], jnp.exp(total[..., -1]), 0)
    added = dot("bhsp,bsn->bhpn", (written * out_of[..., None]).astype(x.dtype), b)
    state = keeps[..., None, None] * state + added
    return (state, last), y.transpose(0, 2, 1, 3).astype(x.dtype)


def block_of(seq: int, most: int) -> int:
    """The length of the fewest equal blocks that hold `seq` positions, `most` each at most; whole eights if several."""
    count = -(-seq // most)
    return seq if count == 1 else min(most, -(-seq // (count * 8)) * 8)


def pad(size: int, x: jax.Array, dt: jax.Array, b: jax.Array, c: jax.Array, runs: jax.Array) -> Blocks:
    """All with whole blocks of positions: those added have dt = 0, which neither decays nor writes."""
    missing = -x.shape[1] % size
    if not missing:
        return x, dt, b, c, runs
    after = lambda v: jnp.pad(v, ((0, 0), (0, missing)) + ((0, 0),) * (v.ndim - 2))  # noqa: E731
    return after(x), after(dt), after(b), after(c), jnp.pad(runs, ((0, 0), (0, missing)), mode="edge")


def _split(x: jax.Array, size: int) -> jax.Array:
    """[batch, blocks * size, ...] -> [blocks, batch, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
