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
from adaptive.inference.engine.pieces import pieces
from adaptive.inference.requests import Full, Request
from adaptive.inference.sampling import Sampler
from adaptive.models.depth import expert_choice

SHAPE = {"width": 16, "heads": 2, "hidden": 32, "vocab_size": 320}
ROUTED = shapes.mor(5, 3, expert_choice.Settings(capacities=(1.0, 0.6, 0.3)), **SHAPE)
PLAIN = shapes.plain(2, **SHAPE)
BYTES = {"hidden": 32, "rotary_dim": 4, "d_state": 8, "ssm_head_dim": 8, "ssm_block": 16}
HNET = shapes.hnet(("m1", ("T1",), "T1"), widths=(16, 16), **BYTES)
GREEDY, CHANCE = Drawing(temperature=0), Drawing(temperature=1.3, top_p=0.8)
TEXTS = (b"the cat sat on the mat, and so did the dog that saw it", b"a", b"words and", b"more of them", b"the end")
PROMPTS = [np.frombuffer(text, np.uint8).astype(np.int32) for text in TEXTS]


@functools.cache
def sampler(model, how):
    return Sampler(*split_model(model), how=how)


@functools.cache
def alone(model, how, prompt):
    """What the plain loop makes of one prompt: (tokens, logprobs, depths)."""
    made = [p for p in sampler(model, how)([PROMPTS[prompt]], 9, jax.random.key(prompt)) if not p.prompt]
    return tuple(np.concatenate([getattr(p, name)[0] for p in made]) for name in ("tokens", "logprobs", "depth"))


def engine(model, **options):
    shape = {"rows": 3, "batch": 2, "length": 80, "piece": 16, "group": 1}
    return Engine(*split_model(model), **(shape | options))


def tokens_of(ticket):
    return [made.token for made in ticket]


@pytest.fixture(scope="module")
def routed():
    """An engine of single passes, which keeps the beginnings of two prompts."""
    with engine(ROUTED, prefixes=2) as served:
        yield served


def check_answers(served, model, rules):
    """Five requests, in two orders: the same tokens, logprobs and depths as of the plain loop, each alone."""
    for order in (range(5), (3, 0, 4, 2, 1)):
        tickets = {
            i: served.submit(Request(PROMPTS[i], 4 + i, rules[i % len(rules)], seed=i, likeliest=2)) for i in order
        }
        for i, ticket in sorted(tickets.items()):
            made = list(ticket)
            tokens, logprobs, depths = alone(model, rules[i % len(rules)], i)
            assert [m.token for m in made] == tokens[: 4 + i].tolist()
            np.testing.assert_allclose([m.logprob for m in made], logprobs[: 4 + i], atol=1e-4)
            assert [m.depth for m in made] == [*depths[: 3 + i].tolist(), None]
            assert ticket.reason == "length" and list(ticket) == []
            assert all(m.flops > 0 for m in made[:-1]) and made[-1].flops is None
            assert all(len(m.likeliest) == 2 and m.likeliest[0][1] >= m.likeliest[1][1] for m in made)
            if rules[i % len(rules)] is GREEDY:
                assert [m.likeliest[0] for m in made] == [(m.token, pytest.approx(m.logprob)) for m in made]


@pytest.mark.compiles
def test_every_request_is_answered_as_if_it_were_alone(routed):
    check_answers(routed, ROUTED, (GREEDY, CHANCE))
    depths = {int(d) for i in range(5) for d in alone(ROUTED, (GREEDY, CHANCE)[i % 2], i)[2]}
    figures = routed.figures()
    assert len(depths) > 1 and figures["pass_launches"] > 0 and figures["token_launches"] > 0
    assert figures["tokens"] == figures["ended_length"] / 5 * sum(range(4, 9))


@pytest.mark.compiles
def test_a_plain_transformer_runs_on_the_same_engine():
    with engine(PLAIN) as served:
        check_answers(served, PLAIN, (GREEDY,))


@pytest.mark.compiles
def test_an_h_net_runs_on_the_same_engine():
    with engine(HNET) as served:
        check_answers(served, HNET, (CHANCE,))
        begins = [m.begins for m in served.submit(Request(PROMPTS[0], 9, CHANCE, likeliest=2))][:-1]
    assert {len(b) for b in begins} == {1} and {b[0] for b in begins} == {True, False}


@pytest.mark.compiles
def test_an_answer_does_not_depend_on_what_was_asked_before(routed):
    """The last of some prompts that begin alike is not read from its beginning, and is answered to the last bit as the
    first."""
    request = Request(PROMPTS[0], 6, CHANCE, seed=3, likeliest=2)
    answers = [list(routed.submit(request)) for _ in range(3)]
    before = routed.figures()["prefix_tokens"]
    answers.append(list(routed.submit(request)))
    assert routed.figures()["prefix_tokens"] - before == 48  # three of the four pieces of 54 tokens
    assert all(own == answers[0] for own in answers)
    other = np.concatenate([PROMPTS[0][:40], PROMPTS[2]])
    first = list(routed.submit(Request(other, 6, CHANCE, seed=3, likeliest=2)))
    with engine(ROUTED) as fresh:
        assert list(fresh.submit(Request(other, 6, CHANCE, seed=3, likeliest=2))) == first


@pytest.mark.compiles
def test_prompts_are_continued_in_pieces_as_by_the_plain_loop(routed):
    prompts = PROMPTS[2:4]
    plain = [p for p in sampler(ROUTED, CHANCE)(prompts, 6, jax.random.key(5)) if not p.prompt]
    expected = np.concatenate([p.tokens for p in plain], 1)
    prompt, *own = pieces(routed, prompts, Request(prompts[0], 6, CHANCE, seed=5, likeliest=2))
    assert prompt.prompt and (prompt.tokens[1, prompt.valid[1]] == prompts[1]).all()
    assert (np.concatenate([p.tokens for p in own], 1) == expected).all()
    end = int(expected[1, 2])
    _, *own = pieces(routed, prompts, Request(prompts[0], 6, CHANCE, seed=5, likeliest=2, end=end))
    valid = np.concatenate([p.valid for p in own], 1)
    assert valid.sum(1).tolist() == [[*row, end].index(end) for row in expected.tolist()]


@pytest.mark.compiles
def test_a_sequence_that_lost_its_row_goes_on_where_it_was():
    with engine(ROUTED, quantum=3) as served:
        tickets = [served.submit(Request(PROMPTS[i], 4 + i, CHANCE, seed=i, likeliest=2)) for i in (4, 3, 1, 2, 0)]
        for i, ticket in zip((4, 3, 1, 2, 0), tickets, strict=True):
            assert tokens_of(ticket) == alone(ROUTED, CHANCE, i)[0][: 4 + i].tolist()
        assert served.figures()["preempted"] > 0


@pytest.mark.compiles
def test_requests_end_wait_and_are_given_up(routed):
    before = routed.figures()
    tokens = alone(ROUTED, GREEDY, 2)[0].tolist()
    ended = routed.submit(Request(PROMPTS[2], 9, GREEDY, end=tokens[3], seed=2, likeliest=2))
    assert tokens_of(ended) == tokens[: tokens.index(tokens[3]) + 1] and ended.reason == "end"
    late = routed.submit(Request(PROMPTS[1], 5, seconds=0.0))
    assert list(late) == [] and late.reason == "deadline"
    long = [routed.submit(Request(PROMPTS[i], 20, GREEDY, likeliest=2)) for i in (0, 2, 4)]
    first = [next(iter(ticket)).token for ticket in long]
    long[1].cancel()
    rest = [1 + len(list(ticket)) for ticket in long]
    assert (rest[0], rest[2]) == (20, 20) and first[0] == alone(ROUTED, GREEDY, 0)[0][0]
    assert long[1].reason in ("cancelled", "length") and rest[1] <= 20
    after = routed.figures()
    assert after["ended_end"] - before["ended_end"] == after["ended_deadline"] - before["ended_deadline"] == 1
    assert (after["running"], after["waiting"]) == (0, 0) and after["cache_bytes_per_token"] > 0


@pytest.mark.compiles
def test_what_can_never_be_computed_is_refused_at_once(monkeypatch):
    served = engine(ROUTED, queue=2)
    begin = threading.Event()
    monkeypatch.setattr(served, "_launch", lambda: begin.wait(60) and False)
    assert "at most 80" in served.refuse(Request(np.arange(76), 5))
    assert "empty" in served.refuse(Request(np.zeros(0, np.int32), 5))
    assert "vocabulary" in served.refuse(Request(np.array([320]), 5))
    assert "0 to 20" in served.refuse(Request(PROMPTS[1], 5, likeliest=21))
    assert "at least 1" in served.refuse(Request(PROMPTS[1], 0))
    with pytest.raises(ValueError, match="4294967295"):
        served.submit(Request(PROMPTS[1], 5, seed=-1))
    tickets = [served.submit(Request(PROMPTS[1], 5))]
    with pytest.raises(Full, match="2 requests wait") as full:
        for _ in range(6):
            tickets.append(served.submit(Request(PROMPTS[1], 5)))
    assert full.value.seconds > 0
    threading.Timer(0.1, begin.set).start()
    served.close(finish=False)
    assert {ticket.reason for ticket in tickets} == {"cancelled"} and list(tickets[0]) == []
    with pytest.raises(RuntimeError, match="closed"):
        served.submit(Request(PROMPTS[1], 5))
    with pytest.raises(RecipeError, match="order=cycle"):
        engine(shapes.recursive(4, 2, order="sequence", **SHAPE))


@pytest.mark.compiles
def test_a_failure_reaches_everyone_who_waits(monkeypatch):
    served = engine(ROUTED, rows=1)
    asked = threading.Event()

    def launch():
        asked.wait(60)
        raise FloatingPointError("broken")

    monkeypatch.setattr(served, "_launch", launch)
    tickets = [served.submit(Request(PROMPTS[i], 5)) for i in range(3)]
    asked.set()
    for ticket in tickets:
        with pytest.raises(FloatingPointError, match="broken"):
            list(ticket)
    assert {ticket.reason for ticket in tickets} == {"failed"}
    with pytest.raises(RuntimeError, match="failed: broken"):
        served.submit(Request(PROMPTS[1], 5))
