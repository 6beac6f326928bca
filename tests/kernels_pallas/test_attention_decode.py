"""Attention over caches: every form against the formula, row by row; what is read; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import decode_gpu, decode_tpu
from kernels_pallas.attention.decode import decode, everywhere
from kernels_pallas.attention.decode_visits import visits

FORMS = {
    "xla": everywhere,
    "gpu": functools.partial(decode_gpu.decode, block=16, splits=3, interpret=True),
    "tpu": functools.partial(decode_tpu.decode, block=16, interpret=True),
}
LENGTHS = np.asarray([0, 1, 60, 75], np.int32)
# Queries, heads, heads of keys, head_dim, options.
CASES = {
    "one query": (1, 15, 5, 64, {}),
    "some queries": (3, 4, 2, 40, {}),
    "channels along lanes": (1, 4, 2, 128, {"window": 30, "sinks": 2}),
    "window": (2, 4, 4, 16, {"window": 20}),
    "window, sinks, cap": (3, 2, 1, 16, {"window": 17, "sinks": 5, "soft_cap": 2.0}),
}


def formula(q, k, v, lengths, *, window=0, sinks=0, soft_cap=0.0):
    """Query by query, in float64."""
    out = np.zeros(q.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    for row, i, head in np.ndindex(q.shape[:3]):
        end = lengths[row] - (q.shape[1] - 1 - i)
        seen = [j for j in range(max(end, 0)) if not window or j >= end - window or j < sinks]
        if not seen:
            continue
        scores = k[row, seen, head // group] @ q[row, i, head] * q.shape[3] ** -0.5
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        weights = np.exp(scores - scores.max())
        out[row, i, head] = weights @ v[row, seen, head // group] / weights.sum()
    return out


def draw(queries, heads, kv_heads, dim, slots=75, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (4, queries, heads, dim), (4, slots, kv_heads, dim), (4, slots, kv_heads, dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_formula(form, name):
    *shape, given = CASES[name]
    q, k, v = draw(*shape)
    options = {"window": 0, "sinks": 0, "soft_cap": 0.0, **given}
    out = jax.jit(functools.partial(FORMS[form], **options))(q, k, v, LENGTHS)
    np.testing.assert_allclose(out, formula(q, k, v, LENGTHS, **given), atol=2e-6)


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_what_a_row_does_not_hold_is_not_read(form):
    """Rows that take no part and slots behind a row's length hold no numbers."""
    q, k, v = draw(1, 4, 2, 16)
    expected = formula(q, k, v, LENGTHS)
    behind = (np.arange(k.shape[1]) >= LENGTHS[:, None])[..., None, None]
    k, v = jnp.where(behind, jnp.nan, k), jnp.where(behind, jnp.nan, v)
    out = jax.jit(FORMS[form])(q, k, v, LENGTHS)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.compiles
@pytest.mark.parametrize("dim", [16, 128])
def test_tpu_kernel_under_the_simulator(dim):
    q, k, v = draw(1, 4, 2, dim, slots=40, dtype=jnp.bfloat16)
    lengths = np.asarray([0, 33, 0, 40], np.int32)
    run = functools.partial(decode_tpu.decode, block=16, window=10, sinks=2, interpret=pltpu.InterpretParams())
    out = jax.jit(run)(q, k, v, lengths)
    np.testing.assert_allclose(np.asarray(out, np.float32), formula(q, k, v, lengths, window=10, sinks=2), atol=0.02)


@pytest.mark.compiles
def test_a_tpu_fetches_only_blocks_that_are_read():
    lengths = jnp.asarray([0, 40, 0, 0, 100, 16], jnp.int32)
    reads = visits(lengths, 1, 30, 4, 16)
    tables = [np.asarray(x) for x in (*reads, decode_tpu._sources(reads.total))]
    turns = [tuple(int(x) for x in decode_tpu.fetched(r, t, *tables)) for r in range(6) for t in range(7)]
    fetches = [a for a, b in zip(turns, [None, *turns], strict=False) if a != b]
    assert fetches == [(1, 0), (1, 1), (1, 2), (4, 0), (4, 4), (4, 5), (4, 6), (5, 0)]


@pytest.mark.compiles
def test_rows_that_take_no_part_give_nothing():
    q, k, v = draw(2, 4, 2, 16)
    active = np.asarray([True, True, False, True])
    out = np.asarray(decode(q, k, v, jnp.asarray(LENGTHS), active=jnp.asarray(active), window=9, sinks=1))
    np.testing.assert_allclose(out, formula(q, k, v, LENGTHS * active, window=9, sinks=1), atol=2e-6)
    assert not out[2].any()


def test_it_has_no_gradient():
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 1, 2, 8), (2, 4, 1, 8), (2, 4, 1, 8)))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.eval_shape(jax.grad(lambda *a: decode(*a).sum()), q, k, v, lengths)


@pytest.mark.parametrize(
    "name, shape, dtype, options",
    [
        ("q", (2, 4, 8), jnp.float32, {}),
        ("q", (2, 1, 3, 8), jnp.float32, {}),
        ("k", (3, 5, 2, 8), jnp.float32, {}),
        ("k", (2, 5, 2, 8), jnp.bfloat16, {}),
        ("v", (2, 6, 2, 8), jnp.float32, {}),
        ("lengths", (2, 1), jnp.int32, {}),
        ("lengths", (2,), jnp.float32, {}),
        ("active", (3,), jnp.bool_, {}),
        ("window", None, None, {"window": -1}),
        ("sinks", None, None, {"sinks": -1}),
        ("soft_cap", None, None, {"soft_cap": -1.0}),
    ],
)
def test_what_does_not_fit_is_named(name, shape, dtype, options):
    kinds = {"q": (2, 1, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), "lengths": (2,), "active": (2,)}
    dtypes = {"lengths": jnp.int32, "active": jnp.bool_}
    given = {key: jax.ShapeDtypeStruct(kind, dtypes.get(key, jnp.float32)) for key, kind in kinds.items()}
    if shape is not None:
        given[name] = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=f"^{name} "):
        jax.eval_shape(functools.partial(decode, **options), **given)
