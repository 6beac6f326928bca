"""Using parameters of linear maps."""

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.site import normal_param
from adaptive.parallel.rules import constrain, gathered, seq_shards
from kernels_pallas.choice import active_target

__all__ = ["normal_param", "projected", "scored", "times", "use"]


def use(param: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The parameter's value in the compute dtype, gathered over the axes that only storage is split by."""
    return gathered(param[...], param.get_metadata()["axes"], dtype)


def times(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [batch, n, a] times w [a, b] -> [batch, n, b], as a product of two matrices.

    With three dimensions XLA transposes an operand of the weight's gradient on CPUs: a fifth more of a step's time. But
    positions of split sequences are not one dimension with the batch: XLA would gather them.
    """
    if seq_shards() > 1:
        return jnp.einsum("bna,ac->bnc", x, w)
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def scored(x: jax.Array, w: jax.Array, precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST) -> jax.Array:
    """x [batch, n, a] times w [a, b] -> [batch, n, b], of which there are few: a router's, for each choice.

    For GPUs a product for each row of the batch. Routers lay the gradients of scores out by choice, and of one product
    for all rows XLA finds no tiles then, unless n is a multiple of them: it does not compile (jax 0.10.2).
    """
    current = active_target()
    if current is None or current.platform != "gpu":
        return jnp.matmul(x, w, precision=precision)
    each = jnp.broadcast_to(w, (x.shape[0], *w.shape))
    return jnp.einsum("bna,bac->bnc", x, each, precision=precision)


def projected(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x [batch, n, width] through weight [width, heads, head_dim] -> [batch, n, heads, head_dim]."""
    w = use(weight, x.dtype)
    out = times(x, w.reshape(w.shape[0], -1)).reshape(*x.shape[:2], *w.shape[1:])
    return constrain(out, "batch", "seq", "heads", None)
