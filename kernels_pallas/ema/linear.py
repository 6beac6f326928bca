"""The moving average and its gradient by way of a linear recurrence, which every kernel provides.

recurrence(x, gain, keep, initial, reverse=False): out_k = gain_k x_k + keep_k out_{k-1}, with out_{-1} = initial; with
`reverse` k counts from the last position. x [batch, n, width], gain and keep f32[batch, n], initial f32[batch, width].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Recurrence = Callable[..., jax.Array]


def forward(recurrence: Recurrence, z: jax.Array, p: jax.Array, starts: jax.Array, initial: jax.Array) -> jax.Array:
    """f32[batch, n, width]: `reference.ema`."""
    return recurrence(z, p, jnp.where(starts, 0, 1 - p), initial)


def backward(
    recurrence: Recurrence,
    z: jax.Array,
    p: jax.Array,
    starts: jax.Array,
    initial: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of z, p and initial for that of the result `out`.

    The gradient of a linear recurrence is the same one backwards: a position adds to the next what that keeps of it.
    """
    keep = jnp.where(starts, 0, 1 - p)
    after = jnp.pad(keep[:, 1:], ((0, 0), (0, 1)))
    total = recurrence(d_out, jnp.ones_like(p), after, jnp.zeros_like(initial), reverse=True)
    past = jnp.where(starts[..., None], 0, jnp.concatenate([initial[:, None], out[:, :-1]], 1))
    d_p = (total * (z.astype(jnp.float32) - past)).sum(-1)
    return (p[..., None] * total).astype(z.dtype), d_p, keep[:, :1] * total[:, 0]
