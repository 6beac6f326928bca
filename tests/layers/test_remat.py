"""What a backward pass finds and what it computes again."""

import jax
import jax.numpy as jnp
import pytest

from adaptive.layers.remat import recomputed
from kernels_pallas.attention import attention
from kernels_pallas.choice import target


@pytest.mark.parametrize(
    ("remat", "matmuls", "attended"), [("none", 0, 1), ("attention", 0, 1), ("dots", 0, 2), ("layer", 1, 2)]
)
def test_policies_keep_matmuls_and_attention(remat, matmuls, attended):
    """Of a layer that is a matmul, attention, and a second matmul whose result no gradient needs."""
    shapes = (2, 512, 4 * 8), (4 * 8, 4 * 8), (4 * 8, 3)

    def layer(x, w, out):
        heads = jnp.tanh(x @ w).reshape(2, 512, 4, 8)
        return attention(heads, heads, heads).reshape(x.shape) @ out

    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with target("cpu"):  # where attention is one loop forward and one backward
        traced = jax.make_jaxpr(jax.grad(lambda *a: recomputed(layer, remat)(*a).sum(), argnums=(0, 1, 2)))(*given)
    found = list(equations(traced.jaxpr))
    assert found.count("scan") == attended + 1
    assert found.count("dot_general") == 2 + 4 + matmuls  # those of the loops apart


def equations(jaxpr):
    """Names of all primitives, of loops without what is in them."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name not in ("scan", "while"):
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
