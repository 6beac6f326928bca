"""The engine behind the server: what a request is answered is what the engine writes."""

import jax
import pytest
import shapes
from flax import nnx
from serving_cases import Client

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine import Engine
from adaptive.inference.requests import Request
from adaptive.recipe import Recipe
from adaptive.runs.load import Trained
from adaptive.serving.served import served_by

pytestmark = pytest.mark.compiles

MODEL = shapes.mor(4, 2, "token_choice", vocab_size=320, width=16, hidden=16, heads=2)


def test_a_model_is_served():
    recipe = Recipe(name="made", model=MODEL).with_("train.compute_dtype=float32", "data.seq_len=64")
    graphdef, state = nnx.split(recipe.model.build(jax.random.key(0)))
    tokenizer = load_tokenizer("bytes")
    trained = Trained(recipe, 1, graphdef, state, tokenizer, "")
    with Engine.of(trained, rows=2, length=64, queue=8) as engine:
        client = Client(served=served_by(engine, trained, engine.length, 60.0))
        asked = {"prompt": ["The ", "One of "], "max_tokens": 8, "temperature": 0, "details": True}
        status, answer = client.json("/v1/completions", asked)
        alone = [engine.submit(Request(tokenizer.encode(text), 8, Drawing(0.0))) for text in asked["prompt"]]
        expected = [[made.token for made in ticket] for ticket in alone]
        figures = client.ask("/metrics")[2].decode()
    assert status == 200, answer
    for choice, tokens in zip(answer["choices"], expected, strict=True):
        told = choice["details"]
        assert [token["token"] for token in told] == tokens and choice["text"] == tokenizer.decode(tokens)
        assert all(token["depth"] in (1, 2) for token in told[:-1]) and told[-1]["depth"] is None
    assert "adaptive_engine_rows 2\n" in figures and "adaptive_engine_requests_total 4\n" in figures
