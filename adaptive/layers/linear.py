"""Using parameters of linear maps."""

import jax
from flax import nnx

from adaptive.layers.site import normal_param
from adaptive.parallel.rules import constrain, gathered

__all__ = ["normal_param", "projected", "times", "use"]


def use(param: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The parameter's value in the compute dtype, gathered over the axes that only storage is split by."""
    return gathered(param[...], param.get_metadata()["axes"], dtype)


def times(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [batch, n, a] times w [a, b] -> [batch, n, b], as a product of two matrices.

    With three dimensions XLA transposes an operand of the weight's gradient on CPUs: a fifth more of a step's time.
    """
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def projected(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x [batch, n, width] through weight [width, heads, head_dim] -> [batch, n, heads, head_dim]."""
    w = use(weight, x.dtype)
    out = times(x, w.reshape(w.shape[0], -1)).reshape(*x.shape[:2], *w.shape[1:])
    return constrain(out, "batch", "seq", "heads", None)
