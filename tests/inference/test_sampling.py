"""Continuations against the plain forward pass, for rows of different lengths and models of every kind."""

import jax
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError
from adaptive.inference import sampling
from adaptive.inference.drawing import Drawing
from adaptive.inference.sampling import Sampler, marker_of, prompt_tokens, sample
from adaptive.models.depth import expert_choice
from adaptive.recipe import Recipe
from adaptive.routing.stages import at_bytes

pytestmark = pytest.mark.compiles

SHAPE = {"width": 16, "heads": 2, "hidden": 32, "vocab_size": 320}
PLAIN = shapes.plain(5, **SHAPE)
ROUTED = shapes.mor(5, 3, expert_choice.Settings(capacities=(1.0, 0.6, 0.3)), **SHAPE)
BYTES = {"hidden": 32, "rotary_dim": 4, "d_state": 8, "ssm_head_dim": 8, "ssm_block": 16}
HNET = shapes.hnet(("m1", ("T1", ("T1",), "T1"), "T1"), widths=(16, 16, 32), **BYTES)
ONE_STAGE = shapes.hnet(("m1", ("T1",), "T1"), widths=(16, 16), **BYTES)
HOW = Drawing(temperature=1.3, top_p=0.8)
PROMPTS = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"the cat sat on the mat", b"a", b"words and")]


def rows_of(pieces):
    """(tokens i32[n], boundaries bool[stages, n]) of each row of the continuation alone."""
    made = [(piece.tokens, piece.valid, piece.boundaries) for piece in pieces if not piece.prompt]
    tokens, valid, stages = (np.concatenate(arrays, -1) for arrays in zip(*made, strict=True))
    return [(tokens[r, valid[r]], stages[:, r, valid[r]]) for r in range(len(tokens))]


@pytest.mark.parametrize("model", [PLAIN, ROUTED, HNET], ids=["plain", "routed", "hnet"])
def test_the_likeliest_tokens_are_those_of_the_forward_pass(model):
    graphdef, state = split_model(model)
    forward = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t, selection="threshold"))
    pieces = list(Sampler(graphdef, state, how=Drawing(temperature=0))(PROMPTS, 9, jax.random.key(1), at_once=4))
    found, logprobs = rows_of(pieces), np.concatenate([p.logprobs for p in pieces if not p.prompt], -1)
    for r, (prompt, (tokens, stages)) in enumerate(zip(PROMPTS, found, strict=True)):
        whole = np.concatenate([prompt, tokens])
        padded = np.pad(whole, (0, 32 - len(whole)))  # what comes after changes nothing before
        out = forward(state, padded[None])
        assert len(tokens) == 9
        logits = np.asarray(out.logits[0, len(prompt) - 1 : len(whole) - 1], np.float64)
        assert (logits.argmax(-1) == tokens).all()
        own = logits.max(-1) - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(logprobs[r], own, atol=1e-4, rtol=0)
        views = at_bytes(out.trace.stages, (1, 32))
        assert stages.shape == (len(views), 9)
        for s, view in enumerate(views):
            assert (np.asarray(view.mask[0, len(prompt) : len(whole)]) == stages[s]).all()
    if model is HNET:
        shares = np.mean([stages.mean(1) for _, stages in found], 0)
        assert 0 < shares[1] < shares[0] < 1


def test_neither_the_size_of_pieces_nor_other_rows_change_a_row(monkeypatch):
    graphdef, state = split_model(ONE_STAGE)
    once = Sampler(graphdef, state, how=HOW)
    key = jax.random.key(3)
    alone = rows_of(once(PROMPTS[:1], 10, key, at_once=10))
    monkeypatch.setattr(sampling, "PIECE", 16)  # the first prompt is read in two
    several = rows_of(once(PROMPTS, 10, key, at_once=4))
    assert (several[0][0] == alone[0][0]).all() and (several[0][1] == alone[0][1]).all()
    few = rows_of(Sampler(graphdef, state, how=HOW, rows=1)(PROMPTS, 10, key, at_once=4))
    assert all((a == b).all() for x, y in zip(few, several, strict=True) for a, b in zip(x, y, strict=True))
    assert any(len(set(tokens)) > 1 for tokens, _ in few)


def test_a_row_ends_at_the_end_token_while_others_go_on():
    graphdef, state = split_model(PLAIN)
    free = rows_of(Sampler(graphdef, state, vocab=256)(PROMPTS, 10, jax.random.key(0)))
    end = int(free[0][0][4])
    expected = [tokens[: list(tokens).index(end)] if end in tokens else tokens for tokens, _ in free]
    assert {len(tokens) for tokens in expected} != {10}
    ended = rows_of(Sampler(graphdef, state, vocab=256, end=end)(PROMPTS, 10, jax.random.key(0), at_once=3))
    assert all((a == b).all() and len(a) == len(b) for a, (b, _) in zip(expected, ended, strict=True))
    assert all((tokens < 256).all() for tokens, _ in free)
    pieces = list(Sampler(graphdef, state, vocab=256, end=end)(PROMPTS[:1], 60, jax.random.key(0), at_once=3))
    assert sum(not piece.prompt for piece in pieces) <= 3  # nothing is computed for long after the end
    assert (sample(graphdef, state, PROMPTS[0], 10, jax.random.key(0), vocab=256, end=end) == expected[0]).all()


class EveryThird:
    def __init__(self):
        self.seen = []

    def push(self, byte: int) -> bool:
        self.seen.append(byte)
        return len(self.seen) % 3 == 1


def test_a_marker_says_where_chunks_begin():
    graphdef, state = split_model(shapes.hnet(("m1", ("T1",), "T1"), widths=(16, 16), chunker="words", **BYTES))
    pieces = list(
        Sampler(graphdef, state, how=Drawing(temperature=0), marker=EveryThird)(PROMPTS, 7, jax.random.key(0))
    )
    whole = [
        (np.concatenate([p.tokens[r, p.valid[r]] for p in pieces]),
         np.concatenate([p.boundaries[0, r, p.valid[r]] for p in pieces]))
        for r in range(3)
    ]  # fmt: skip
    forward = jax.jit(lambda state, t, b: nnx.merge(graphdef, state)(t, boundaries=b).logits)
    for prompt, (tokens, marks) in zip(PROMPTS, whole, strict=True):
        assert (marks == (np.arange(len(tokens)) % 3 == 0)).all()
        pad = (0, 32 - len(tokens))
        logits = forward(state, np.pad(tokens, pad)[None], np.pad(marks, pad)[None])[0]
        assert (np.asarray(logits[len(prompt) - 1 : len(tokens) - 1].argmax(-1)) == tokens[len(prompt) :]).all()


def test_a_penalty_counts_the_prompt_and_what_was_drawn():
    """Against the forward pass, token by token, with the set of tokens that the row has."""
    graphdef, state = split_model(PLAIN)
    forward = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t, selection="threshold"))
    how = Drawing(temperature=0, repetition_penalty=1.7)
    found = rows_of(Sampler(graphdef, state, how=how, vocab=256)(PROMPTS, 9, jax.random.key(1), at_once=4))
    plain = rows_of(Sampler(graphdef, state, how=Drawing(temperature=0), vocab=256)(PROMPTS, 9, jax.random.key(1)))
    assert any((a != b).any() for (a, _), (b, _) in zip(found, plain, strict=True))
    for prompt, (tokens, _) in zip(PROMPTS, found, strict=True):
        whole = np.concatenate([prompt, tokens])
        logits = np.asarray(forward(state, np.pad(whole, (0, 32 - len(whole)))[None]).logits[0])
        for i in range(len(prompt), len(whole)):
            row = logits[i - 1, :256].copy()
            seen = np.unique(whole[:i])
            row[seen] = np.where(row[seen] > 0, row[seen] / 1.7, row[seen] * 1.7)
            assert row.argmax() == whole[i]


def test_prompts_begin_as_the_tokenizer_says():
    assert prompt_tokens(load_tokenizer("hnet-bytes"), "ab").tolist() == [254, 97, 98]
    assert prompt_tokens(load_tokenizer("hnet-bytes"), "").tolist() == [254]
    assert prompt_tokens(load_tokenizer("bytes"), "ab").tolist() == [97, 98]
    with pytest.raises(DataError, match="empty"):
        prompt_tokens(load_tokenizer("bytes"), "")
    assert marker_of(Recipe(name="x"), load_tokenizer("bytes")) is None
