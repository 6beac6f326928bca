"""What a grouped matmul costs, told to the compiler, which takes a kernel for free unless it is told."""

import math

import jax
from jax.experimental import pallas as pl

from kernels_pallas import costs

Shaped = jax.Array | jax.ShapeDtypeStruct


def cost(rows: Shaped, weights: Shaped, others: Shaped) -> pl.CostEstimate:
    """Of rows [R, .] times matrices [G, K, N], or of the outer products of `rows` and `others` that have their shape:
    every row meets one matrix."""
    return costs.cost(2 * rows.shape[0] * math.prod(weights.shape[1:]), 0, rows, weights, others)
