"""`adaptive generate` with a diffusion model: texts, marks of steps, refusals."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
import shapes
from diffusion_toys import MASK, Toy
from test_generate import made

from adaptive import generate
from adaptive.errors import UserError
from adaptive.inference.diffusion.batching import Engine
from adaptive.inference.diffusion.caches import Cache, window
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.filters import observed
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.named import named
from adaptive.inference.diffusion.policies import Policy, learned, threshold
from adaptive.inference.diffusion.texts import Asked, decoder_of, written
from adaptive.inference.drawing import Drawing
from adaptive.inference.requests import Request
from adaptive.recipe import Recipe
from adaptive.runs.load import find, load

pytestmark = pytest.mark.compiles

SMALL = {"vocab_size": 320, "width": 16, "hidden": 16, "heads": 2}
SMALL_DIGITS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
DIGITS = str.maketrans(SMALL_DIGITS, "0123456789")
TEXT = ("data.tokenizer=bytes", "data.seq_len=64")


@pytest.fixture(scope="module")
def filling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "filling"
    made(folder, shapes.plain(1, **SMALL), "objective=masked_diffusion", *TEXT, steps=(3,))
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = generate.main([*map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def test_texts_steps_and_records(run, filling):
    options = ("--workdir", filling, "--prompt", "A cat", "--tokens", 16, "--steps", 4, "--ignore_end")
    code, text, told = run(*options)
    assert code == 0 and text.startswith("A cat") and "16 tokens in 4 calls, 4.00 a call in each text" in told
    code, marked, _ = run(*options, "--show_steps")
    legend, _, shown = marked.partition("\n\n")
    assert code == 0 and "which call wrote each token" in legend and "\x1b" not in marked
    numbers = [int(found.translate(DIGITS)) for found in re.findall(f"[{SMALL_DIGITS}]+", shown)]
    assert numbers and set(numbers) <= {1, 2, 3, 4} and re.sub(f"[{SMALL_DIGITS}]+", "", shown) == text
    code, line, _ = run(*options, "--json")
    record = json.loads(line)
    assert "A cat" + record["text"] + "\n" == text and record["ended"] == "length"
    assert sorted(record["calls"]) == [call for call in range(4) for _ in range(4)]
    assert {number - 1 for number in numbers} <= set(record["calls"])
    assert len(record["logprobs"]) == 16 and max(record["logprobs"]) < 0


def test_a_run_ends_with_a_text(filling):
    """In whole blocks, about as many tokens as the recipe says."""
    trained = load(find(filling))
    prompt = np.frombuffer(b"A cat", np.uint8).astype(np.int32)
    ids = written(trained, prompt, 16, jax.random.key(0))
    assert len(ids) == 16 or ids[-1] == trained.tokenizer.eos_id
    assert (ids < trained.tokenizer.vocab_size).all() and trained.tokenizer.mask_id not in ids


def test_a_run_is_served_by_rows_that_come_and_go(filling):
    trained = load(find(filling))
    prompts = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"A cat", b"Then ")]
    with Engine.of(trained, rows=2, length=13, block=8) as engine:
        requests = [Request(prompt, 8, Drawing(temperature=0)) for prompt in prompts]
        tickets = [engine.submit(request) for request in requests]
        found = [[made.token for made in ticket] for ticket in tickets]
    decoder = decoder_of(Asked(8, block=8, policy="threshold"), trained)
    expected = decoder(prompts)
    assert found == [expected.tokens[r, len(p) : len(p) + 8].tolist() for r, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--block", 7), ["block=7", "length 16", "1, 2, 4, 8, 16"]),
        (("--steps", 32), ["steps=32", "16"]),
        (("--steps", 3, "--block", 4), ["steps=3", "4 would be"]),
        (("--top_k", 3), ["--top_k", "masked_diffusion"]),
        (("--policy", "treshold"), ["--policy treshold", "did you mean threshold?"]),
        (("--policy", "threshold(0.5, radius=2)"), ["radius=2", "threshold, which has threshold"]),
        (("--policy", "threshold(-1)"), ["threshold=-1", "at least 0"]),
        (("--policy", "threshold", "--steps", 4), ["--steps 4", "threshold"]),
        (("--policy", "learned(nowhere)"), ["policy.filter=nowhere", "No such file"]),
        (("--cache", "block"), ["cache block", "block diffusion"]),
        (("--cache", "greedy"), ["cache greedy", "policy random"]),
        (("--cache", "window(4, 8)"), ["cache.inner=8", "cache.outer=4"]),
        (("--cache", "cycle(2)"), ["--cache cycle", "window"]),
    ],
)
def test_what_cannot_work(run, filling, options, words):
    code, _, told = run("--workdir", filling, "--prompt", "A", "--tokens", 16, *options)
    assert code == 2 and "Traceback" not in told and all(word in told for word in words), told


def test_a_model_of_next_tokens_and_a_mask_that_is_missing(run, tmp_path):
    made(tmp_path / "causal", shapes.plain(1, **SMALL), *TEXT, steps=(3,))
    for option in (("--steps", 4), ("--show_steps",), ("--policy", "threshold")):
        code, _, told = run("--workdir", tmp_path / "causal", "--prompt", "A", *option)
        assert code == 2 and f"{option[0]} is for diffusion models" in told and "next_token" in told
    short = Recipe(name="short", model=shapes.plain(1, **SMALL | {"vocab_size": 258}))
    short = short.with_("objective=masked_diffusion", *TEXT)
    (tmp_path / "short" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "short" / "recipe.json").write_text(short.to_json())
    code, _, told = run("--workdir", tmp_path / "short", "--prompt", "A")
    assert code == 2 and "vocab_size=" in told and "Traceback" not in told


def test_names_with_values():
    assert named(Policy, "threshold(0.5)", "--policy") == threshold.Settings(0.5)
    assert named(Cache, "window(64, inner=16)", "--cache") == window.Settings(64, 16)
    for text in ("window(", "window(1, outer=2)", "window(1, 1, 1, 1)"):
        with pytest.raises(UserError, match="--cache"):
            named(Cache, text, "--cache")


def test_a_filter_is_learned_from_decoded_texts(tmp_path):
    rng = np.random.default_rng(0)
    confidence = rng.random((400, 4)).astype(np.float32)
    found = learned.fit(confidence, confidence > 0.6, rng.random((400, 4)) < 0.8, hidden=16, steps=300, rate=0.03)
    found.save(tmp_path / "filter.npz")
    path = str(tmp_path / "filter.npz")
    calls = (np.asarray(learned.loaded(path).logits(confidence)) > 0) == (confidence > 0.6)
    assert calls.mean() > 0.9
    with pytest.raises(UserError, match="blocks of 4 positions, not 8"):
        Plan(MASK, 16, 16, 8, policy=learned.Settings(path)).check()


def test_what_a_filter_is_fitted_to():
    decoder, prompts = Decoder(Toy(), Plan(MASK, 8, 8, 4)), [np.arange(5), np.arange(1, 6)]
    found, last = observed(decoder, prompts), decoder(prompts).tokens
    assert found.free.sum(1).tolist() == [4, 4, 3, 3, 2, 2, 1, 1] * 2
    assert (found.confidence[~found.free] == 1).all() and (found.confidence[found.free] < 1).all()
    proposals = [np.asarray(step.proposal.token) for step in decoder.steps(prompts)]
    for call, row, block in itertools.product(range(8), range(2), range(2)):
        if call // 4 == block:
            own = slice(5 + 4 * block, 9 + 4 * block)
            assert (found.final[2 * call + row] == (proposals[call][row, own] == last[row, own])).all()
