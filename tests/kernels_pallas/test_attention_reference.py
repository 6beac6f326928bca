"""The reference attention against the textbook formula, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention.reference import MASKED, attention, masked_softmax

pytestmark = pytest.mark.compiles


def textbook(q, k, v, mask):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_with_queries_that_see_nothing(kv_heads, rows):
    rng = np.random.default_rng(kv_heads)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    q, k, v, g = draw(2, 5, 4, 6), draw(2, 7, kv_heads, 6), draw(2, 7, kv_heads, 6), draw(2, 5, 4, 6)
    mask = rng.random((rows, 5, 7)) < 0.6
    mask[:, 2] = False

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(f, q, k, v, mask, g):
        out, pull = jax.vjp(lambda *a: f(*a, mask), q, k, v)
        return out, pull(g)

    (got, grads), (want, expected) = (pulled(f, q, k, v, mask, g) for f in (attention, textbook))
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
    assert not np.asarray(grads[0])[:, 2].any()


def test_what_the_backward_pass_keeps_is_of_the_compute_dtype():
    scores, mask = jnp.ones((1, 1, 4, 4)), jnp.tril(jnp.ones((1, 4, 4), bool))
    weights, pull = jax.vjp(lambda s: masked_softmax(s, mask, jnp.bfloat16), scores)
    assert weights.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.ndim == 4} == {jnp.dtype(jnp.bfloat16)}
    assert pull(jnp.ones_like(weights))[0].dtype == jnp.float32
