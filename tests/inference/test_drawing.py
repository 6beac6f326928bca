"""Rules of drawing against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.inference.drawing import Drawing, draw, largest, near_the_likeliest, nucleus, penalised

pytestmark = pytest.mark.compiles

SHARES = np.array([0.1, 0.5, 0.05, 0.3, 0.05])
LOGITS = np.log(SHARES).astype(np.float32)


def kept(logits: jax.Array) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits))).tolist()


def test_top_k_keeps_the_largest_and_their_equals():
    assert [kept(largest(LOGITS, k)) for k in (1, 2, 3, 4, 5, 99)] == [
        [1], [1, 3], [0, 1, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip


def test_the_nucleus_just_exceeds_its_share():
    assert [kept(nucleus(LOGITS, p)) for p in (1e-6, 0.49, 0.51, 0.85, 0.95)] == [
        [1], [1], [1, 3], [0, 1, 3], [0, 1, 2, 3, 4],
    ]  # fmt: skip


def test_min_p_compares_with_the_likeliest():
    for share in (0.05, 0.15, 0.5, 0.7, 1.0):
        assert kept(near_the_likeliest(LOGITS, share)) == np.flatnonzero(share * 0.5 - 1e-7 <= SHARES).tolist()


def test_a_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits, seen = np.array([2.0, 2.0, -3.0, -3.0, 0.0]), np.array([True, False, True, False, True])
    assert penalised(logits, seen, 1.5).tolist() == pytest.approx([2 / 1.5, 2.0, -4.5, -3.0, 0.0])
    assert penalised(logits, seen, 0.5).tolist() == pytest.approx([4.0, 2.0, -1.5, -3.0, 0.0])


def expected(how: Drawing, seen: np.ndarray) -> np.ndarray:
    """Probabilities of the tokens, one rule after the other."""
    logits = LOGITS.astype(np.float64)
    logits = np.where(
        seen, np.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty), logits
    )
    p = np.exp(logits / how.temperature)
    order = np.argsort(-p, kind="stable")
    if how.top_k:
        p[order[how.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before > how.top_p]] = 0
    p /= p.sum()
    p[p < how.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "how",
    [
        Drawing(temperature=1.0),
        Drawing(temperature=0.5),
        Drawing(temperature=1.0, top_k=2),
        Drawing(temperature=1.0, top_p=0.7),
        Drawing(temperature=2.0, min_p=0.5),
        Drawing(temperature=1.0, repetition_penalty=2.0),
        Drawing(temperature=1.3, top_k=3, top_p=0.8, min_p=0.1, repetition_penalty=1.5),
    ],
)
def test_draws_follow_the_rules_in_their_order(how):
    seen = np.array([False, True, False, False, True])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: draw(jnp.asarray(LOGITS), key, how, jnp.asarray(seen)))(keys)
    shares = np.bincount(np.asarray(drawn), minlength=5) / 4000
    wanted = expected(how, seen)
    assert np.abs(shares - wanted).max() < 0.03
    assert ((shares > 0) <= (wanted > 0)).all()


def test_temperature_0_takes_the_likeliest_after_the_penalty():
    seen = jnp.array([False, True, False, False, False])
    key = jax.random.key(0)
    assert draw(jnp.asarray(LOGITS), key, Drawing(temperature=0)) == 1
    assert draw(jnp.asarray(LOGITS), key, Drawing(temperature=0, repetition_penalty=2.0), seen) == 3
