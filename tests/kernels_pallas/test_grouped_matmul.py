"""Grouped matmul against the masked sum over groups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import grouped_matmul, reference

CASES = {
    "balanced": (64, [16, 16, 16, 16]),
    "empty groups and rows past the last": (50, [0, 7, 0, 30, 0]),
    "one takes all": (700, [0, 700, 0]),
    "several block sizes": (1300, [33, 0, 812, 1, 300]),
    "fewer rows than a block": (5, [2, 1, 2]),
    "one group": (40, [37]),
    "no rows used": (40, [0, 0]),
}


def draw(rows, groups, k=6, n=10, dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    shapes = (rows, k), (groups, k, n), (rows, n)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    total, sizes = CASES[case]
    rows, weights, g = draw(total, len(sizes), dtype=dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    got, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes), rows, weights)
    # The reference runs in float32: in bfloat16 its own gradients are summed over groups with a rounding each.
    exact = [x.astype(jnp.float32) for x in (rows, weights)]
    want, expected = jax.vjp(lambda r, w: reference.grouped_matmul(r, w, sizes), *exact)
    for a, b in zip((got, *pull(g)), (want, *expected(g.astype(jnp.float32))), strict=True):
        assert a.dtype == dtype
        tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == jnp.float32 else {"rtol": 1e-2, "atol": 1e-2}
        np.testing.assert_allclose(np.asarray(a, np.float32), b, **tolerance)
