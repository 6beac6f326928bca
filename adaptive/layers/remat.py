"""What the backward pass of a layer computes again instead of keeping."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "layer", "dots"]


def recomputed(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`layer`, of which the backward pass keeps everything, its inputs alone, or the results of its matmuls too."""
    match remat:
        case "none":
            return layer
        case "layer":
            return jax.checkpoint(layer)
        case "dots":
            return jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
