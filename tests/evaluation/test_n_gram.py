"""The judge by counts, against the formula written out."""

import collections
import math

import numpy as np
import pytest

from adaptive.evaluation.n_gram import NGram


def plain(counted, tokens, vocab, order):
    def chance(context, token):
        shorter = chance(context[1:], token) if context else 1 / vocab
        follows = collections.Counter(
            counted[i + len(context)]
            for i in range(len(counted) - len(context))
            if counted[i : i + len(context)] == context
        )
        total = sum(follows.values())
        return (follows[token] + len(follows) * shorter) / (total + len(follows)) if total else shorter

    return [-math.log(chance(tokens[max(0, i - order + 1) : i], tokens[i])) for i in range(len(tokens))]


def test_nats_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    counted, tokens = rng.integers(0, 4, 60).tolist(), rng.integers(0, 5, 12).tolist()
    judge = NGram(np.array(counted), 5, 3)
    expected = plain(counted, tokens, 5, 3)
    np.testing.assert_allclose(judge.nats(np.array(tokens)), expected, rtol=1e-9)
    np.testing.assert_allclose(judge.nats(np.array(tokens), 4), expected[4:], rtol=1e-9)
    following = [sum(math.exp(-plain(counted, [*tokens[:5], t], 5, 3)[5]) for t in range(5))]
    np.testing.assert_allclose(following, 1, rtol=1e-9)


def test_grams_that_64_bits_do_not_hold():
    with pytest.raises(ValueError, match="64 bits"):
        NGram(np.arange(9), 50_000, 5)
