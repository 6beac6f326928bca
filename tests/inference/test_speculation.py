"""Drafts of a recursion's first passes: what is generated is what it was without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive import generate
from adaptive.errors import RecipeError, UserError
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine import Engine, speculation
from adaptive.inference.engine.speculation import Drafting
from adaptive.inference.requests import Request
from adaptive.models.depth import expert_choice
from adaptive.recipe import load

SHAPE = {"width": 16, "heads": 2, "hidden": 32, "vocab_size": 6}
ROUTED = shapes.mor(5, 3, expert_choice.Settings(capacities=(1.0, 0.6, 0.3)), **SHAPE)
PROMPT = np.array([1, 4, 2, 2, 5], np.int32)
RULES = (Drawing(temperature=0), Drawing(temperature=0.8, top_k=4, repetition_penalty=1.3))


@functools.cache
def likelihood(temperature):
    """f64[6, 6]: of the two tokens that follow the prompt, by the plain forward pass."""
    graphdef, state = split_model(ROUTED)
    rows = jnp.concatenate([jnp.broadcast_to(PROMPT, (6, 5)), jnp.arange(6)[:, None]], axis=1).astype(jnp.int32)
    logits = nnx.merge(graphdef, state)(rows, selection="threshold").logits[:, 4:]
    p = np.asarray(jax.nn.softmax(logits / temperature, axis=-1), np.float64)
    return p[0, 0][:, None] * p[:, 1]


def engine(**options):
    return Engine(*split_model(ROUTED), rows=16, length=32, piece=16, queue=400, **options)


@pytest.fixture(scope="module")
def drafting():
    with engine(drafting=Drafting(3)) as served:
        yield served


@pytest.mark.compiles
def test_text_with_drafts_is_that_without(drafting):
    """Greedy and sampled, of rows that draft as many as suits them."""
    requests = [Request(PROMPT[: 2 + i], 12 + i, RULES[i % 2], seed=i) for i in range(4)]
    made = []
    with engine(stepwise=False) as plain:
        for served in (plain, drafting):
            tickets = [served.submit(request) for request in requests]
            made.append([[(m.token, m.depth) for m in ticket] for ticket in tickets])
        turns = [served.figures()["turn_launches"] for served in (plain, drafting)]
    assert made[0] == made[1]
    assert turns[1] < 0.8 * turns[0]  # some drafts were right


@pytest.mark.compiles
def test_the_distribution_is_that_of_the_model(drafting):
    """Two tokens of 400 requests against their exact probabilities: chi squared below its 99.9th percentile. The seeds
    are fixed, so that the test cannot fail by chance."""
    n, temperature = 400, 6.0
    tickets = [drafting.submit(Request(PROMPT, 3, Drawing(temperature), seed=s)) for s in range(n)]
    made = np.array([[m.token for m in ticket] for ticket in tickets])
    expected = n * likelihood(temperature)
    counts = np.zeros((6, 6))
    np.add.at(counts, (made[:, 0], made[:, 1]), 1)
    assert expected.min() > 0.4
    assert ((counts - expected) ** 2 / expected).sum() < 66.6  # of 35 degrees of freedom


@pytest.mark.compiles
def test_what_cannot_draft_is_refused():
    refuse = speculation.refuse
    assert refuse(ROUTED) == "" and refuse(ROUTED, 2) == ""
    assert "1 to 2 can" in refuse(ROUTED, 3)
    assert "only a recursion" in refuse(shapes.plain(2))
    assert "attention alone" in refuse(shapes.recursive(5, 3, pattern=(shapes.block(mixer="mamba2"),)))
    with pytest.raises(RecipeError, match="only a recursion"):
        Engine(*split_model(shapes.plain(2, **SHAPE)), drafting=Drafting(2))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--draft_fixed"], "--draft N"),
        (["--draft", "2", "--interactive"], "neither --interactive"),
        (["--draft", "2"], "only a recursion"),
    ],
)
def test_drafts_that_generate_refuses(words, problem):
    given = generate.options().read(["--workdir", "x", *words])
    with pytest.raises(UserError, match=problem):
        generate.check_marks(given, load("vanilla_tiny"))


@pytest.mark.compiles
def test_longer_drafts_for_those_that_are_right_more_often():
    lengths = speculation.worth(ROUTED, Drafting(6))
    assert lengths[0] == 0 and lengths[100] == 6 and (np.diff(lengths) >= 0).all()
    assert set(speculation.worth(ROUTED, Drafting(6, adapts=False))) == {6}
    share = speculation.share_after(
        jnp.array([0.5, 0.5, 0.5]), jnp.array([4, 0, 0]), jnp.array([4, 4, 0]), jnp.array([True, True, True])
    )
    assert share[0] > 0.5 > share[1] and share[2] == 0.5
