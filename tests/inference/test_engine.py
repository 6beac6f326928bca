"""An engine beside the plain loop of generation, for models of every kind."""

import functools
import threading

import jax
import numpy as np
import pytest
import shapes
from hnet_models import split_model

from adaptive.errors import RecipeError
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine import Engine
from adaptive.inference.requests import Full, Request
from adaptive.inference.sampling import Sampler
from adaptive.models.depth import expert_choice

pytestmark = pytest.mark.compiles

SHAPE = {"width": 16, "heads": 2, "hidden": 32, "vocab_size": 320}
ROUTED = shapes.mor(5, 3, expert_choice.Settings(capacities=(1.0, 0.6, 0.3)), **SHAPE)
BYTES = {"hidden": 32, "rotary_dim": 4, "d_state": 8, "ssm_head_dim": 8, "ssm_block": 16}
HNET = shapes.hnet(("m1", ("T1",), "T1"), widths=(16, 16), **BYTES)
RULES = (
    Drawing(temperature=0),
    Drawing(temperature=1.3, top_p=0.8),
    Drawing(temperature=0.9, top_k=5, repetition_penalty=1.4),
    Drawing(temperature=1.0, min_p=0.05),
)
TEXTS = (b"the cat sat on the mat, and so did the dog", b"a", b"words and", b"more of them", b"the end")
PROMPTS = [np.frombuffer(text, np.uint8).astype(np.int32) for text in TEXTS]


@functools.cache
def alone(model, how, prompt, seed, tokens=9):
    """What the plain loop makes of one prompt: (tokens, logprobs, depths)."""
    pieces = sampler(model, how)([PROMPTS[prompt]], tokens, jax.random.key(seed))
    made = [p for p in pieces if not p.prompt]
    return tuple(np.concatenate([getattr(p, name)[0] for p in made]) for name in ("tokens", "logprobs", "depth"))


@functools.cache
def sampler(model, how):
    return Sampler(*split_model(model), how=how)


def engine(model, **options):
    return Engine(*split_model(model), **({"rows": 2, "length": 64, "piece": 16, "group": 1} | options))


@pytest.mark.parametrize("model", [ROUTED, HNET], ids=["routed", "hnet"])
def test_every_request_is_answered_as_if_it_were_alone(model):
    """Five requests on two rows, in two orders: the same tokens, logprobs and depths as of the plain loop."""
    for order in (range(5), (3, 0, 4, 2, 1)):
        with engine(model) as served:
            tickets = {i: served.submit(Request(PROMPTS[i], 4 + i, RULES[i % 2], seed=i, likeliest=2)) for i in order}
            made = {i: list(ticket) for i, ticket in tickets.items()}
        for i, own in made.items():
            tokens, logprobs, depths = alone(model, RULES[i % 2], i, i)
            assert [m.token for m in own] == tokens[: 4 + i].tolist()
            np.testing.assert_allclose([m.logprob for m in own], logprobs[: 4 + i], atol=1e-4)
            assert [m.depth for m in own] == [*depths[: 3 + i].tolist(), None]
            assert tickets[i].reason == "length"
            best = [m.likeliest[0] for m in own]
            assert all(len(m.likeliest) == 2 and m.likeliest[0][1] >= m.likeliest[1][1] for m in own)
            if i % 2 == 0:
                assert best == [(m.token, pytest.approx(m.logprob)) for m in own]


def test_each_row_draws_by_its_own_rules():
    with engine(ROUTED, rows=4) as served:
        tickets = [served.submit(Request(PROMPTS[1], 9, how, seed=7)) for how in RULES]
        made = [[m.token for m in ticket] for ticket in tickets]
    assert made == [alone(ROUTED, how, 1, 7)[0].tolist() for how in RULES]


def test_requests_end_wait_and_are_refused():
    tokens = alone(ROUTED, RULES[0], 2, 0)[0].tolist()
    with engine(ROUTED, rows=1, queue=2) as served:
        ended = served.submit(Request(PROMPTS[2], 9, RULES[0], end=tokens[3]))
        assert [m.token for m in ended] == tokens[: tokens.index(tokens[3]) + 1] and ended.reason == "end"
        long = served.submit(Request(PROMPTS[0], 20, RULES[0]))
        first = next(iter(long))
        late = served.submit(Request(PROMPTS[1], 5, seconds=0.0))
        assert list(late) == [] and late.reason == "deadline"
        waiting = [served.submit(Request(PROMPTS[1], 5)) for _ in range(2)] if long.reason is None else []
        if len(waiting) == 2 and long.reason is None:
            with pytest.raises(Full, match="2 requests wait"):
                served.submit(Request(PROMPTS[1], 5))
        long.cancel()
        rest = list(long)
        assert long.reason in ("cancelled", "length") and first.token == alone(ROUTED, RULES[0], 0, 0)[0][0]
        assert all(len(list(ticket)) == 5 for ticket in waiting) and len(rest) < 20
        assert "at most 64" in served.refuse(Request(np.arange(60), 5))
        assert "empty" in served.refuse(Request(np.zeros(0, np.int32), 5))
        assert "vocabulary" in served.refuse(Request(np.array([320]), 5))
        assert "0 to 20" in served.refuse(Request(PROMPTS[1], 5, likeliest=21))
        with pytest.raises(ValueError, match="at least 1"):
            served.submit(Request(PROMPTS[1], 0))
        figures = served.figures()
    assert figures["tokens"] >= 4 and figures["ended_deadline"] == 1 and figures["running"] == 0
    with pytest.raises(RuntimeError, match="closed"):
        served.submit(Request(PROMPTS[1], 5))


def test_a_failure_reaches_everyone_who_waits(monkeypatch):
    served = engine(ROUTED)
    broken = threading.Event()

    def turn(*_):
        broken.set()
        raise FloatingPointError("broken")

    for name in ("turn", "token"):
        monkeypatch.setattr(served._programs, name, turn)
    tickets = [served.submit(Request(PROMPTS[i], 5)) for i in range(3)]
    assert broken.wait(60)
    for ticket in tickets:
        with pytest.raises(FloatingPointError, match="broken"):
            list(ticket)
    assert {ticket.reason for ticket in tickets} == {"failed"}
    with pytest.raises(RuntimeError, match="failed: broken"):
        served.submit(Request(PROMPTS[1], 5))


def test_what_cannot_generate_is_refused():
    with pytest.raises(RecipeError, match="order=cycle"):
        engine(shapes.recursive(4, 2, order="sequence", **SHAPE))
