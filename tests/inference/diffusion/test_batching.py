"""Requests that come and go, against each decoded alone."""

import threading

import jax
import numpy as np
import pytest
from diffusion_toys import MASK, Toy

from adaptive.inference.diffusion.batching import Engine
from adaptive.inference.diffusion.caches import block, none
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.policies import threshold
from adaptive.inference.drawing import Drawing
from adaptive.inference.requests import Full, Request

pytestmark = pytest.mark.compiles

POLICY = threshold.Settings(0.6)
RNG = np.random.default_rng(0)
REQUESTS = [
    Request(RNG.integers(0, MASK, n), tokens, Drawing(temperature=heat), seed=seed)
    for seed, (n, tokens, heat) in enumerate([(3, 9, 0.0), (8, 4, 0.0), (2, 10, 0.7), (5, 7, 0.0), (4, 8, 0.0)])
]


def alone(request, cache):
    """The row decoded by itself, in as much room as the engine has."""
    plan = Plan(MASK, request.tokens, 8, 4, policy=POLICY, temperature=request.how.temperature)
    decoder = Decoder(Toy(4), plan, cache)
    found = decoder([request.prompt], jax.random.key(request.seed))
    return found.tokens[0, len(request.prompt) : found.lengths[0]].tolist()


def test_rows_at_different_blocks_are_those_alone():
    network = Toy(4)
    with Engine(network, MASK, rows=2, length=12, block=4, policy=POLICY, cache=block.Settings()) as engine:
        tickets = [engine.submit(request) for request in REQUESTS]
        found = [[made.token for made in ticket] for ticket in tickets]
        figures = engine.figures()
    assert found == [alone(request, none.Settings()) for request in REQUESTS]
    assert all(ticket.reason == "length" for ticket in tickets)
    assert figures["tokens"] == sum(request.tokens for request in REQUESTS) and figures["requests"] == 5
    assert figures["launches"] < figures["tokens"] and figures["ended_length"] == 5
    assert figures["rows_computed"] > figures["launches"] - 5  # some calls are of two rows
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(REQUESTS[0])


def test_an_end_a_cancelled_one_and_a_full_queue():
    expected = alone(REQUESTS[0], none.Settings())
    gate = threading.Event()

    class Gated(Toy):
        def __call__(self, *args, **options):
            gate.wait()
            return super().__call__(*args, **options)

    with Engine(Gated(4), MASK, rows=1, length=12, queue=1, block=4, policy=POLICY) as engine:
        first = engine.submit(Request(REQUESTS[0].prompt, 9, Drawing(temperature=0), end=expected[3]))
        while not engine.figures()["running"]:
            pass
        waiting = engine.submit(REQUESTS[1])
        with pytest.raises(Full, match="1 requests wait"):
            engine.submit(REQUESTS[2])
        waiting.cancel()
        gate.set()
        made = [one.token for one in first]
        assert made == expected[: expected.index(expected[3]) + 1] and first.reason == "end"
        assert list(waiting) == [] and waiting.reason == "cancelled"
        for request, words in (
            (Request(np.zeros(0, int), 1), "empty"),
            (Request(np.zeros(9, int), 9), "at most 12"),
            (Request(np.zeros(2, int), 2, Drawing(top_k=3)), "top_k"),
            (Request(np.array([MASK]), 2), "stands for what is not written yet"),
        ):
            assert words in engine.refuse(request)
