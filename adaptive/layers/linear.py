"""Parameters of linear maps, with logical axis names and the init every model here shares."""

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.parallel.rules import gathered


def normal_param(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, stack: tuple[int, ...] = ()
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), `stack` leading layer axes included."""
    return nnx.Param(std * jax.random.normal(key, (*stack, *shape), jnp.float32), axes=(None,) * len(stack) + axes)


def use(param: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The parameter's value in the compute dtype, gathered over the axes that only storage is split by."""
    return gathered(param[...], param.get_metadata()["axes"], dtype)
