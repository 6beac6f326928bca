"""What an engine launches next, how its rows draw, what tokens cost, and which beginnings of prompts it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.account import account
from adaptive.inference.drawing import Drawing, draw
from adaptive.inference.engine.costs import Costs
from adaptive.inference.engine.draws import Rules, draw_rows, keys, rules_of
from adaptive.inference.engine.plan import Launch, Sizes, choose, expected, whole
from adaptive.inference.engine.prefixes import Prefixes
from adaptive.recipe import load

SIZES = Sizes((4, 8), (4, 8), (1, 2))
RULES = (
    Drawing(temperature=0),
    Drawing(temperature=0, repetition_penalty=1.7),
    Drawing(temperature=1.3, top_p=0.8),
    Drawing(temperature=0.9, top_k=5, repetition_penalty=1.4),
    Drawing(temperature=1.0, min_p=0.05, top_k=9, top_p=0.9),
    Drawing(),
)


def test_full_launches_come_first_and_a_turn_before_a_pass():
    assert choose(9, 8, 17, SIZES, ()) == Launch("turn", 8)
    assert choose(9, 7, 16, SIZES, ()) == Launch("pass", 8)
    assert choose(8, 0, 16, SIZES, [Launch("pass", 8)]) == Launch("pass", 8)


def test_what_would_not_fill_a_launch_waits_for_those_that_fly():
    assert choose(5, 7, 16, SIZES, [Launch("pass", 8)]) is None
    assert choose(5, 7, 12, SIZES, ()) == Launch("turn", 8)
    assert choose(5, 3, 8, SIZES, ()) == Launch("pass", 8)
    assert choose(3, 1, 4, SIZES, ()) == Launch("pass", 4)
    assert choose(0, 0, 0, SIZES, ()) is None


def test_few_rows_take_all_passes_in_one_launch_one_behind_another():
    assert choose(1, 0, 1, SIZES, [Launch("token", 1)]) == Launch("token", 1)
    assert choose(1, 1, 2, SIZES, [Launch("read", 1)]) == Launch("token", 2)
    assert choose(1, 1, 2, SIZES, [Launch("pass", 4)]) is None
    assert choose(1, 0, 0, SIZES, [Launch("token", 1)]) is None
    assert whole(3, Sizes((1, 4))) == Launch("turn", 4) and whole(0, Sizes((1, 4))) is None


def test_of_a_pass_in_flight_nothing_is_sure():
    assert expected((9, 2), [Launch("pass", 8)]) == (1, 2)
    assert expected((1, 9), [Launch("turn", 8)]) == (9, 1)
    assert expected((1, 9), [Launch("turn", 8), Launch("read", 1), Launch("token", 2)]) == (10, 1)


@pytest.mark.compiles
def test_each_row_draws_by_its_own_rules():
    rng = np.random.default_rng(0)
    n, logits = len(RULES), jnp.asarray(rng.normal(size=(len(RULES), 33)) * 3, jnp.float32)
    seen, seeds = jnp.asarray(rng.random((n, 33)) < 0.3), jnp.asarray(rng.integers(9, size=(n, 2)), jnp.uint32)
    how = Rules(*(jnp.stack(values) for values in zip(*map(rules_of, RULES), strict=True)))
    drawn = jax.jit(draw_rows)
    for number in range(4):
        numbers = jnp.full(n, number, jnp.int32)
        found, own = drawn(logits, seeds, numbers, how, seen), keys(seeds, numbers)
        for i, rule in enumerate(RULES):
            one = functools.partial(draw, how=rule)
            assert found[i] == one(logits[i], own[i], seen=seen[i])
            alone = drawn(
                logits[i][None], seeds[i][None], numbers[:1], Rules(*(a[i][None] for a in how)), seen[i][None]
            )
            assert alone[0] == found[i]


@pytest.mark.parametrize("name", ["vanilla_tiny", "mor_tiny", "hnet_mor_tiny"])
def test_tokens_cost_together_what_the_account_says_of_their_row(name):
    model, n = load(name).model, 640
    stages, passes = len(model.body.stages()) - 1, model.body.passes
    costs = Costs(model)
    everything = [(float(n),) * stages, (float(n),) * passes] if stages else [(float(n),) * passes]
    whole = account(model, n, *everything).forward_flops_per_token * n
    assert sum(costs.token(passes, [i] * (stages + 1)) for i in range(n)) == pytest.approx(whole, rel=1e-3)
    if stages:
        assert costs.token(1, [9]) < costs.token(1, [9, 4]) < costs.token(2, [9, 4])
    elif passes > 1:
        assert costs.token(1, [9]) < costs.token(2, [9])


def test_a_beginning_is_kept_when_it_comes_again_in_place_of_the_one_used_longest_ago():
    kept = Prefixes(1, 4)
    tokens, other = np.arange(10), np.arange(10) + 1
    for own in (tokens, other):
        assert kept.find(own) is None and kept.keep(own, 4) is None and kept.keep(own, 3) is None
    assert kept.keep(tokens, 4) == 0 and kept.find(tokens) == (0, 4)
    assert kept.find(tokens[:4]) is None  # something must be left to read
    assert kept.keep(other, 4) == 0 and kept.find(tokens) is None and kept.find(other) == (0, 4)
    assert Prefixes(0, 4).find(tokens) is None
