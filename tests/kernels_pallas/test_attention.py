"""Attention by intervals of keys: what is seen, blocks in XLA, the TPU's kernel, and the choice between them."""

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, assert_equals_formula, cases, causal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import attention, blocked, delta_of, splash
from kernels_pallas.attention.seen import Seen
from kernels_pallas.attention.tiles import of_all_rows
from kernels_pallas.choice import target


def by_rule(index, keys, segments, valid, window, sinks, is_causal):
    """bool[queries, keys]: what a query at an index sees, pair by pair."""
    mask = np.zeros((len(index[0]), len(index[1])), bool)
    for i, at in enumerate(index[0]):
        for j, key in enumerate(index[1]):
            near = (key <= at if is_causal else True) and (
                not window or (at - window < key and (is_causal or key < at + window)) or (key < sinks and key <= at)
            )
            mask[i, j] = near and valid[j] and segments[0][i] == segments[1][j]
    return mask


@pytest.mark.compiles
@pytest.mark.parametrize("seed", range(4))
def test_what_a_query_sees_is_the_rule_pair_by_pair(seed):
    rng = np.random.default_rng(seed)
    n, m = 9, 13
    window, sinks, is_causal = [(0, 0, True), (4, 0, True), (4, 2, True), (3, 0, False)][seed]
    slots = seed % 2  # keys at their slots, or at places of their own
    q_index = np.sort(rng.choice(20, n, replace=False)).astype(np.int32)
    k_index = np.arange(m, dtype=np.int32) if slots else np.sort(rng.choice(20, m, replace=False)).astype(np.int32)
    documents = np.sort(rng.integers(0, 2, 20)).astype(np.int32)
    valid = rng.random(m) < 0.8
    q, k, v, _ = arrays(n, m, rows=1)
    got = attention(
        q, k, v, q_index=q_index[None], k_index=None if slots else k_index[None], q_segments=documents[q_index][None],
        k_segments=documents[k_index][None], k_valid=valid[None], window=window, sinks=sinks, causal=is_causal,
    )  # fmt: skip
    mask = by_rule((q_index, k_index), m, (documents[q_index], documents[k_index]), valid, window, sinks, is_causal)
    group = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, group[0]) * 0.25
    want = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), group[1])
    np.testing.assert_allclose(got[:, mask.any(1)], want[:, mask.any(1)], atol=2e-6)


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["reference", "blocks"])
def test_queries_may_say_themselves_what_they_see(form, monkeypatch):
    rng = np.random.default_rng(0)
    n, m = 20, 26
    k_index = np.sort(rng.choice(40, m, replace=False)).astype(np.int32)
    bounds = np.sort(rng.integers(0, 40, (n, 3)), axis=1).astype(np.int32).T
    bounds[2] += 1
    if form == "blocks":
        monkeypatch.setattr("kernels_pallas.attention.SHORT", 1)
        monkeypatch.setattr("kernels_pallas.attention.FEW", 1)
    q, k, v, _ = arrays(n, m, rows=1)
    at = dict(zip(("q_before", "q_first", "q_end"), bounds[:, None], strict=True))
    got = attention(q, k, v, q_index=np.arange(n, dtype=np.int32)[None], k_index=k_index[None], **at)
    mask = (k_index < bounds[0][:, None]) | ((k_index >= bounds[1][:, None]) & (k_index < bounds[2][:, None]))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, axis=2)) * 0.25
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    want = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(got[:, mask.any(1)], want[:, mask.any(1)], atol=2e-6)
    with pytest.raises(ValueError, match="all must be given"):
        attention(q, k, v, q_index=np.arange(n, dtype=np.int32)[None], k_index=k_index[None], q_end=bounds[2][None])


@pytest.mark.compiles
@pytest.mark.parametrize("name", cases())
def test_blocks_equal_the_formula(name):
    queries, keys, seen = cases()[name]
    assert_equals_formula(blocked, queries, keys, seen, block=8)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["window and sinks", "documents", "some queries, all keys"])
def test_the_kernel_of_tpus_equals_the_formula(name, monkeypatch):
    if name == "documents":  # more keys than a call takes
        monkeypatch.setattr(splash, "MOST_KEYS", splash.LANES)
    queries, keys, seen = cases(n=200, k=140)[name]
    cap = 2.0 if name == "documents" else 0.0
    assert_equals_formula(splash, queries, keys, seen, soft_cap=cap, head_dim=24, interpret=True)


@st.composite
def patterns(draw):
    """(queries, keys, Seen) of two rows: any intervals and sinks, any documents, keys that do not exist."""
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rows = lambda n, least, most: np.array(  # noqa: E731
        draw(st.lists(st.lists(st.integers(least, most), min_size=n, max_size=n), min_size=2, max_size=2)), np.int32
    )
    tags = (rows(queries, 0, 2), rows(keys, -1, 2)) if draw(st.booleans()) else (None, None)
    sinks = rows(queries, 0, keys) if draw(st.booleans()) else None
    return queries, keys, Seen(rows(queries, 0, keys), rows(queries, 0, keys), sinks, *tags)


@pytest.mark.compiles
@settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(pattern=patterns(), block=st.sampled_from([3, 8]))
def test_any_pattern_is_computed_in_blocks(pattern, block):
    assert_equals_formula(blocked, *pattern, block=block, soft_cap=1.5, heads=(2, 1), head_dim=4)


@pytest.mark.compiles
@pytest.mark.parametrize("block", [4, 64])
def test_tiles_hold_every_pair_that_is_seen(block):
    for queries, keys, seen in cases().values():
        tiles = np.asarray(of_all_rows(seen, queries, keys, block, block))
        mask = np.asarray(seen.mask(keys)).any(0)
        whole = np.pad(mask, [(0, -n % block) for n in mask.shape])
        needed = whole.reshape(whole.shape[0] // block, block, -1, block).any((1, 3))
        assert tiles.shape == needed.shape and not (needed & ~tiles).any(), (queries, keys)


@pytest.mark.compiles
def test_tiles_outside_are_passed_over():
    assert np.asarray(of_all_rows(causal(64), 64, 64, 8, 8)).sum() == 8 * 9 // 2
    assert np.asarray(of_all_rows(causal(64, window=8), 64, 64, 8, 8)).sum() == 8 + 7
    assert np.asarray(of_all_rows(causal(64, window=8, sinks=1), 64, 64, 8, 8)).sum() == 8 + 7 + 6
    documents = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 16)[None]
    assert np.asarray(of_all_rows(causal(64)._replace(q_tags=documents, k_tags=documents), 64, 64, 8, 8)).sum() == 4 * 3


@pytest.mark.compiles
def test_memory_grows_with_the_row_and_not_with_its_square():
    def temporaries(n):
        shapes = [jax.ShapeDtypeStruct((1, n, 2, 16), jnp.float32)] * 3
        with target("cpu"):
            step = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2))).lower(*shapes)
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 1.2 * temporaries(1024) + 2048 * 2 * 16 * 4 * 8


@pytest.mark.compiles
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_bfloat16_stays_within_its_rounding(platform):
    form, options = {"cpu": (blocked, {}), "tpu": (splash, {"interpret": True})}[platform]
    q, k, v, g = (x.astype(jnp.bfloat16) for x in arrays(130, 130))
    out, lse = form.forward(q, k, v, causal(130), **options)
    grads = form.backward(q, k, v, causal(130), delta_of(out, g), lse, g, **options)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    (want, _), pull = jax.vjp(lambda *a: attention_cases.dense(*a, causal(130)), *wide[:3])
    for a, b in zip((want, *pull((wide[3], jnp.zeros_like(lse)))), (out, *grads), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(b.astype(jnp.float32), a, atol=0.03 * float(jnp.abs(a).max()))


REFUSED = {
    "q": {"q": np.ones((2, 3, 4))},
    "k is": {"k": np.ones((2, 5, 3, 8))},
    "v is": {"v": np.ones((2, 4, 2, 8))},
    "floating": {"v": np.ones((2, 5, 2, 8), jnp.bfloat16)},
    "k_index": {"k_index": np.ones((2, 4), np.int32)},
    "q_index": {"q_index": np.ones((2, 3))},
    "k_valid": {"k_valid": np.ones((2, 5), np.int32)},
    "both must be given": {"q_segments": np.ones((2, 3), np.int32)},
    "queries and 5 keys": {"q_index": None, "k_index": None},
    "window": {"window": -1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    fine = {
        "q": np.ones((2, 3, 4, 8)), "k": np.ones((2, 5, 2, 8)), "v": np.ones((2, 5, 2, 8)),
        "q_index": np.ones((2, 3), np.int32), "k_index": np.ones((2, 5), np.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        attention(**{**fine, **REFUSED[name]})
