"""Speculative sampling against the joint distribution of drawing one token after another."""

import itertools

import jax
import numpy as np
import pytest

from adaptive.errors import UserError
from adaptive.inference.diffusion.any_subset import speculate

pytestmark = pytest.mark.compiles

MASK, VOCAB = 3, 4
TABLES = np.random.default_rng(0).normal(size=(3, VOCAB, VOCAB))
START = np.array([1, MASK, MASK, MASK, 2])
ORDER = np.array([3, 0, 1, 4, 2])


def denoise(tokens):
    """What is likely depends on both neighbours; hidden ones say little."""
    out = TABLES[0][tokens] + 2 * TABLES[1][np.roll(tokens, 1, axis=1)] + 2 * TABLES[2][np.roll(tokens, -1, axis=1)]
    return out.astype(np.float32)


def joint(order):
    """Probability of every way to fill the hidden places, drawn in this order."""
    places = [place for place in order if START[place] == MASK]
    found = {}
    for tokens in itertools.product(range(MASK), repeat=3):
        row, chance = START.copy(), 1.0
        for place, token in zip(places, tokens, strict=True):
            logits = denoise(row[None])[0, place, :MASK].astype(np.float64)
            chance *= (np.exp(logits) / np.exp(logits).sum())[token]
            row[place] = token
        found[tuple(row)] = chance
    return found


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_rows_are_distributed_as_if_drawn_one_by_one(ahead):
    rows = 4000
    tokens = np.tile(START, (rows, 1))
    found = speculate(denoise, tokens, mask_id=MASK, ahead=ahead, key=jax.random.key(0), order=ORDER)
    expected = joint(ORDER)
    counts = dict.fromkeys(expected, 0)
    for row in found.tokens.tolist():
        counts[tuple(row)] += 1
    distance = sum(abs(counts[row] / rows - chance) for row, chance in expected.items()) / 2
    independent = joint([1, 2, 3])
    assert distance < 0.03 < sum(abs(independent[row] - chance) for row, chance in expected.items()) / 2
    assert found.calls <= {1: 3, 2: 4, 3: 6}[ahead]
    assert found.rounds.max() <= 3 and found.accepted.mean() > 1.5


def test_what_is_sure_takes_two_calls():
    table = np.eye(9, dtype=np.float32)[np.arange(12) % 8] * 50
    sure = lambda tokens: np.tile(table, (len(tokens), 1, 1))  # noqa: E731
    found = speculate(sure, np.full((2, 12), 8), mask_id=8, ahead=12, key=jax.random.key(0))
    assert found.calls == 2 and (found.accepted == 12).all()
    assert (found.tokens == np.arange(12) % 8).all()


def test_rows_draw_alone():
    tokens = np.tile(START, (3, 1))
    options = {"mask_id": MASK, "ahead": 3, "key": jax.random.key(1)}
    together = speculate(denoise, tokens, **options).tokens
    assert (speculate(denoise, tokens[:1], **options).tokens[0] == together[0]).all()


def test_a_model_that_tells_all_in_one_pass_is_asked_so():
    seen = []

    def verify(tokens, due):
        seen.append(tokens.copy())
        out = np.zeros((len(tokens), max(map(len, due)), VOCAB))
        for r, own in enumerate(due):
            for i, place in enumerate(own):
                row = tokens[r].copy()
                row[own[i:]] = MASK
                out[r, i] = denoise(row[None])[0, place]
        return out

    options = {"mask_id": MASK, "ahead": 3, "key": jax.random.key(2)}
    tokens = np.tile(START, (4, 1))
    assert (
        speculate(denoise, tokens, **options, verify=verify).tokens == speculate(denoise, tokens, **options).tokens
    ).all()
    assert seen and all((each != MASK).all() for each in seen[:1])


def test_numbers_that_cannot_work():
    for options in ({"ahead": 0}, {"ahead": 2, "temperature": 0}):
        with pytest.raises(UserError, match="must be"):
            speculate(denoise, START[None], mask_id=MASK, key=jax.random.key(0), **options)
