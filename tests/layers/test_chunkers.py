"""Chunkers: each against its rule written out, and what the learned ones promise at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.chunkers import Chunker, Heard
from adaptive.layers.chunkers.space import space_like
from adaptive.routing.boundaries import Boundaries
from adaptive.settings import check_ranges

pytestmark = pytest.mark.compiles

BATCH, SEQ, WIDTH = 3, 40, 6


def chunker(kind, *, width=WIDTH, seed=0, **settings):
    return Chunker.member(kind)(**settings).build(width, 0.3, jax.random.key(seed))


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def decided(module, sound: Heard) -> Boundaries:
    return module(sound)


def heard(hidden=None, *, first=None, tokens=None, given=None, key=None) -> Heard:
    """Rows whose documents begin where `first` says, at position 0 where it says nothing."""
    if hidden is None:
        hidden = normal(BATCH, SEQ, WIDTH)
    batch, n, _ = hidden.shape
    first = np.zeros((batch, n), bool) if first is None else np.array(first)
    first[:, 0] = True
    begun = np.maximum.accumulate(np.where(first, np.arange(n), 0), axis=1)
    earlier = None if tokens is None else np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return Heard(
        hidden=jnp.asarray(hidden),
        before=jnp.asarray(np.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]),
        first=jnp.asarray(first),
        number=jnp.asarray(np.arange(n) - begun, jnp.int32),
        tokens=None if tokens is None else jnp.asarray(tokens),
        earlier=None if tokens is None else jnp.asarray(earlier),
        given=given,
        key=key,
    )


def in_loops(hidden, q, k, first):
    """(1 - cos(q h_{t-1}, k h_t)) / 2 in float64, 1 at the first position of a document."""
    hidden, q, k = (np.asarray(a, np.float64) for a in (hidden, q, k))
    out = np.ones(hidden.shape[:2])
    for row in range(hidden.shape[0]):
        for t in range(1, hidden.shape[1]):
            if not first[row, t]:
                a, b = hidden[row, t - 1] @ q, hidden[row, t] @ k
                out[row, t] = (1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) / 2
    return out


@pytest.mark.parametrize("kind", ["dynamic", "similarity"])
def test_probabilities_by_the_formula(kind):
    module, first = chunker(kind), np.zeros((BATCH, SEQ), bool)
    first[0, [9, 10]], first[2, 39] = True, True
    sound = heard(first=first)
    if kind == "dynamic":  # else they are the identity
        module.q[...], module.k[...] = (jnp.asarray(normal(WIDTH, WIDTH, seed=i)) for i in (2, 3))
    got = decided(module, sound)
    want = in_loops(sound.hidden, module.q[...], module.k[...], np.asarray(sound.first))
    np.testing.assert_allclose(got.prob, want, atol=2e-6)
    assert np.abs(want - 0.5).min() > 1e-5
    np.testing.assert_array_equal(got.wanted, want > 0.5)
    assert got.prob.dtype == jnp.float32 and np.all(np.asarray(got.wanted)[np.asarray(sound.first)])


def test_the_dynamic_chunker_begins_with_plain_cosines():
    module = chunker("dynamic")
    for weight in (module.q, module.k):
        np.testing.assert_array_equal(weight[...], np.eye(WIDTH))
    x = np.zeros((1, 5, WIDTH), np.float32)
    x[0, [0, 1], 0], x[0, 2, 0], x[0, 3, 1], x[0, 4, :2] = [1, 7], -2, 3, 1  # same, opposite, orthogonal, at 45 degrees
    got = decided(module, heard(x))
    np.testing.assert_allclose(got.prob[0], [1, 0, 1, 0.5, 0.5 - 0.5**1.5], atol=1e-6)


@pytest.mark.parametrize(("kind", "boundary"), [("dynamic", False), ("similarity", True)])
def test_ties(kind, boundary):
    """At exactly one half the release draws no boundary; ConceptMoE does."""
    module = chunker(kind, width=2)
    module.q[...] = module.k[...] = jnp.eye(2)
    got = decided(module, heard(np.array([[[1, 0], [0, 1], [1, 0]]], np.float32)))
    assert got.prob.tolist() == [[1, 0.5, 0.5]]
    assert got.wanted.tolist() == [[True, boundary, boundary]]


def test_bfloat16_vectors_are_compared_in_float32():
    """Near one half the probability has steps far below those of bfloat16."""
    module = chunker("dynamic", width=64)
    x = normal(1, 200, 64).astype(jnp.bfloat16)
    got = decided(module, heard(x)).prob
    want = in_loops(x.astype(np.float32), np.eye(64), np.eye(64), np.eye(1, 200, dtype=bool))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.dtype == jnp.float32 and len(np.unique(got)) > 190


@pytest.mark.parametrize("kind", ["dynamic", "similarity"])
def test_zero_vectors_have_finite_gradients(kind):
    module = chunker(kind)
    x = np.zeros((1, 5, WIDTH), np.float32)
    x[0, 2:, 0] = 1e-30, 1, 1
    graphdef, state = nnx.split(module)

    @jax.jit
    def grads(state, sound):
        total = lambda state, x, y: nnx.merge(graphdef, state)(sound._replace(hidden=x, before=y)).prob.sum()  # noqa: E731
        return jax.grad(total, (0, 1, 2))(state, sound.hidden, sound.before)

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads(state, heard(x))))
    np.testing.assert_allclose(decided(module, heard(x)).prob[0, 1:3], 0.5, atol=1e-6)


@pytest.mark.parametrize("temperature", [2.0, 6.0])
def test_noise_draws_from_sharpened_probabilities(temperature):
    """Boundaries are drawn with p^(1/tau) at and above one half, 1 - (1 - p)^(1/tau) below."""
    module = chunker("similarity", flip_temperature=temperature)
    hidden = normal(8, 512, WIDTH)
    prob = np.asarray(decided(module, heard(hidden)).prob, np.float64)
    drawn = np.stack([decided(module, heard(hidden, key=jax.random.key(i))).wanted for i in range(16)])
    root = 1 / temperature
    sharp = np.where(prob >= 0.5, prob**root, 1 - (1 - prob) ** root)
    assert np.all(drawn[:, :, 0])
    for low, high in [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]:
        inside = (prob > low) & (prob < high)
        n = inside.sum() * 16
        assert n > 1000
        mean = sharp[inside].mean()
        assert abs(drawn[:, inside].mean() - mean) < 5 * np.sqrt(mean * (1 - mean) / n), (low, high)
    flips = (drawn != (prob >= 0.5)).mean()
    want = np.where(prob >= 0.5, 1 - sharp, sharp).mean()
    assert flips == pytest.approx(want, rel=0.1) and 0.01 < flips < 0.3


def test_without_noise_the_half_decides():
    sound = heard(key=jax.random.key(5))
    calm = decided(chunker("similarity", flip_temperature=0.0), sound)
    np.testing.assert_array_equal(calm.wanted, np.asarray(calm.prob) >= 0.5)
    noisy = decided(chunker("similarity"), sound)
    np.testing.assert_array_equal(noisy.prob, calm.prob)
    assert np.any(np.asarray(noisy.wanted) != np.asarray(calm.wanted))


# Rules


TEXTS = [
    "Hello, world!  Two  spaces\tand\n\nlines.",
    "naïve café — “quoted” 東京 x=1+2;",
    "a1B2-c3_d4 ... \x00\x7f end ",
    "ÿÀ\x80 é",
]


def is_spacelike(byte: int) -> bool:
    """Not an ASCII letter or digit, and no continuation byte of UTF-8 (SpaceByte paper, section 3)."""
    return byte >= 0xC0 or (byte < 0x80 and not chr(byte).isalnum())


def test_what_is_like_a_space():
    got = np.asarray(space_like(jnp.arange(256)))
    assert got.tolist() == [is_spacelike(b) for b in range(256)]
    assert got[ord(" ")] and got[0xE6] and not got[0x9D] and not got[ord("z")] and not got[ord("0")]


@pytest.mark.parametrize("text", TEXTS)
def test_space_begins_where_a_space_follows_none(text):
    raw = [254, *text.encode(), 254, *b"next one", 255]
    tokens = np.array([raw], np.int32)
    first = np.zeros(tokens.shape, bool)
    got = chunker("space")(heard(np.zeros((*tokens.shape, WIDTH)), first=first, tokens=tokens))
    want = [
        t == 0 or byte == 254 or (is_spacelike(byte) and not is_spacelike(raw[t - 1])) for t, byte in enumerate(raw)
    ]
    assert got.wanted[0].tolist() == want
    np.testing.assert_array_equal(got.prob, got.wanted)


def test_stride_counts_within_documents():
    first = np.zeros((1, SEQ), bool)
    first[0, [7, 30]] = True
    got = chunker("stride", length=4)(heard(np.zeros((1, SEQ, WIDTH)), first=first))
    want = [0, 4, *range(7, 30, 4), *range(30, SEQ, 4)]
    assert np.flatnonzero(got.wanted[0]).tolist() == want and got.prob[0].tolist() == [t in want for t in range(SEQ)]


def test_given_boundaries_and_documents_begin_chunks():
    given = jnp.zeros((BATCH, SEQ), bool).at[1, 5].set(True)
    first = np.zeros((BATCH, SEQ), bool)
    first[2, 9] = True
    got = chunker("words")(heard(first=first, given=given)).wanted
    assert [np.flatnonzero(row).tolist() for row in np.asarray(got)] == [[0], [0, 5], [0, 9]]


def test_none_begins_a_chunk_everywhere():
    assert np.all(chunker("none")(heard()).wanted)


@pytest.mark.parametrize(("kind", "message"), [("space", "the outermost stage"), ("words", "data.boundaries=words")])
def test_rules_that_read_what_is_not_there(kind, message):
    with pytest.raises(RecipeError, match=message):
        chunker(kind)(heard())


def test_only_probabilities_of_learned_chunkers_smooth():
    assert {kind for kind in Chunker.kinds() if Chunker.member(kind).learned} == {"dynamic", "similarity"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dynamic", {"target": 1.0}, "chunker.target=1.0: must be above 1"),
        ("similarity", {"flip_temperature": -1.0}, "flip_temperature=-1.0: must be at least 0"),
        ("stride", {"length": 1}, "length=1: must be at least 2"),
    ],
)
def test_settings_that_cannot_be(kind, change, message):
    with pytest.raises(RecipeError, match=message):
        check_ranges(Chunker.member(kind)(**change), "chunker.")
