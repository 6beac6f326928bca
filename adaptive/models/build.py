"""The model that a configuration describes."""

import jax
import jax.numpy as jnp

from adaptive.layers.remat import Remat
from adaptive.models.config import TransformerConfig
from adaptive.models.hnet import HNet
from adaptive.models.transformer import Transformer


def build_model(
    config: TransformerConfig,
    *,
    key: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: Remat = "none",
    unroll: bool = False,
) -> Transformer | HNet:
    """The model that `config` describes, parameters drawn from `key`."""
    make = HNet if config.hnet.layout else Transformer
    return make(config, key=key, dtype=dtype, remat=remat, unroll=unroll)
