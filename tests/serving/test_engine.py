"""The engine behind the server: what a request is answered is what the model writes alone."""

import jax
import pytest
import shapes
from flax import nnx
from serving_cases import Client

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine import Engine
from adaptive.inference.sampling import sample
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
        served = served_by(engine, trained, engine.length, 60.0)
        client = Client(served=served)
        asked = {"prompt": ["The ", "One of "], "max_tokens": 8, "temperature": 0, "details": True, "logprobs": 1}
        status, answer = client.json("/v1/completions", asked)
        figures = client.ask("/metrics")[2].decode()
    assert status == 200, answer
    alone = {"how": Drawing(temperature=0), "vocab": tokenizer.vocab_size, "end": tokenizer.eos_id}
    for choice, prompt in zip(answer["choices"], asked["prompt"], strict=True):
        expected = sample(graphdef, state, tokenizer.encode(prompt), 8, jax.random.key(0), **alone)
        told = choice["details"]
        assert [token["token"] for token in told] == expected.tolist()
        assert all(token["depth"] in (1, 2) and token["flops"] > 0 for token in told[:-1])
    assert "adaptive_engine_rows 2\n" in figures and "adaptive_engine_waiting 0\n" in figures
