"""Patterns of attention that every form must compute, with the dense formula that they are held against."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import delta_of
from kernels_pallas.attention.seen import Seen


def dense(q, k, v, seen: Seen, soft_cap=0.0):
    """The result and log of the sum of exponentials [batch, heads, queries], by the formula; a query that sees nothing
    gets 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    mask = seen.mask(k.shape[1])[:, None]
    scores = jnp.where(mask, scores, -1e9)
    top = scores.max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1), v)
    return out, (top + jnp.log(total))[..., 0]


def causal(n, window=0, sinks=0):
    i = jnp.arange(n, dtype=jnp.int32)[None]
    first = jnp.maximum(i - window + 1, 0) if window else jnp.zeros_like(i)
    return Seen(first, i + 1, jnp.minimum(sinks, i + 1) if sinks else None)


def cases(n=40, k=23):
    """name -> (queries, keys, Seen), two rows each."""
    rng = np.random.default_rng(0)
    documents = jnp.asarray(np.sort(rng.integers(0, 3, (2, n)), axis=1), jnp.int32)
    chosen = jnp.asarray(np.stack([np.sort(rng.choice(n, k, replace=False)) for _ in range(2)]), jnp.int32)
    exists = jnp.asarray(rng.random((2, n)) < 0.7)
    tags = jnp.where(exists, 0, -1)
    return {
        "causal": (n, n, causal(n)),
        "window": (n, n, causal(n, window=7)),
        "window and sinks": (n, n, causal(n, window=7, sinks=3)),
        "documents": (n, n, causal(n)._replace(q_tags=documents, k_tags=documents)),
        "keys that do not exist": (n, n, causal(n)._replace(q_tags=jnp.zeros_like(tags), k_tags=tags)),
        "some queries, all keys": (k, n, Seen(0 * chosen, chosen + 1)),
        "everything": (k, n, Seen(jnp.zeros((1, k), jnp.int32), jnp.full((1, k), n, jnp.int32))),
    }


def arrays(n_q, n_k, heads=4, kv_heads=2, head_dim=16, rows=2, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, n_q, heads, head_dim), *[(rows, n_k, kv_heads, head_dim)] * 2, (rows, n_q, heads, head_dim)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def assert_equals_formula(form, queries, keys, seen, *, atol=2e-6, soft_cap=0.0, heads=(4, 2), head_dim=16, **options):
    """The form's result and gradients are the formula's, wherever a query sees something."""
    q, k, v, g = arrays(queries, keys, *heads, head_dim)
    sees = seen.mask(keys).any(-1)

    def pulled(q, k, v, g):
        (want, lse), pull = jax.vjp(lambda q, k, v: dense(q, k, v, seen, soft_cap), q, k, v)
        expected = pull((g, jnp.zeros_like(lse)))
        got, got_lse = form.forward(q, k, v, seen, soft_cap=soft_cap, **options)
        grads = form.backward(q, k, v, seen, delta_of(got, g), got_lse, g, soft_cap=soft_cap, **options)
        lse, got_lse = (jnp.where(sees[:, None], x, 0) for x in (lse, got_lse))
        return (want, lse, *expected), (jnp.where(sees[..., None, None], got, 0), got_lse, *grads)

    want, got = jax.jit(pulled)(q, k, v, jnp.where(sees[..., None, None], g, 0))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, atol=atol * max(1.0, float(jnp.abs(a).max())))
