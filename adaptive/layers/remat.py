"""What the backward pass of a layer computes again instead of keeping."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from kernels_pallas.attention import KEPT

Remat = Literal["none", "attention", "dots", "layer"]

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION = jax.checkpoint_policies.save_from_both_policies(_DOTS, jax.checkpoint_policies.save_only_these_names(KEPT))


def recomputed(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, of which the backward pass keeps everything; the results of matmuls and of attention; of matmuls; or its
    inputs alone."""
    match remat:
        case "none":
            return layer
        case "attention":
            return jax.checkpoint(layer, policy=_ATTENTION)
        case "dots":
            return jax.checkpoint(layer, policy=_DOTS)
        case "layer":
            return jax.checkpoint(layer)
