"""Held-out measures: sums over all rows, means weighted by tokens, and those of the running average beside them."""

import types

import numpy as np
import pytest
import shapes

from adaptive.data.batch import Batch
from adaptive.recipe import Recipe
from adaptive.training import evaluation
from adaptive.training.evaluation import Evaluator
from adaptive.training.step import Evaluation

ROWS, SEQ = 2, 4


def batch(tokens: int) -> Batch:
    """Rows with so many tokens in all."""
    segments = (np.arange(ROWS * SEQ) < tokens).astype(np.int32).reshape(ROWS, SEQ)
    return Batch(segments, segments, segments, segments, segments.astype(np.float32))


def step(state, rows: Batch, number: int, draw: int) -> Evaluation:
    tokens = float(rows.mask.sum())
    state = State(params=state.params + draw)
    scalars = {"routing/mean_depth": np.float32(number + 1)}
    depth = np.ones((ROWS, SEQ), np.int32)
    return Evaluation(state.params * tokens, tokens, 2 * tokens, np.zeros((ROWS, SEQ)), depth, (), scalars, {}, (), {})


def evaluated(monkeypatch, *settings, **state):
    monkeypatch.setattr(evaluation, "data_shard", lambda mesh: (0, 1))
    asked = []
    data = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(byte_counts=lambda: None),
        validation=lambda rows: asked.append(rows) or [batch(8), batch(2)],
    )
    recipe = Recipe(name="made", model=shapes.plain(2)).with_("eval.rows=3", *settings)
    program = types.SimpleNamespace(
        recipe=recipe, facts=recipe.model.facts(), mesh=None, selections=("topk",), eval_step=lambda counts, mode: step
    )
    row, _ = Evaluator(program, data)(State(**state))
    assert set(asked) == {3}
    return row


class State(types.SimpleNamespace):
    def _replace(self, **changes):
        return State(**(vars(self) | changes))


def test_means_are_over_tokens_not_over_batches(monkeypatch):
    row = evaluated(monkeypatch, params=3.0, ema=())
    assert row["eval/loss"] == 3.0
    assert row["eval/routing/mean_depth"] == pytest.approx((1 * 8 + 2 * 2) / 10)
    assert not any(name.startswith("eval/ema/") for name in row)


def test_noise_is_drawn_several_times_for_a_mean_and_its_error(monkeypatch):
    row = evaluated(monkeypatch, "objective=masked_diffusion", "eval.draws=3", params=3.0, ema=())
    assert row["eval/loss"] == pytest.approx(4.0) and row["eval/draws"] == 3  # of 3, 4 and 5
    assert row["eval/loss_error"] == pytest.approx(1 / 3**0.5)
    assert row["eval/bits_per_byte"] == pytest.approx(4 / 2 / np.log(2))
    assert row["eval/bits_per_byte_error"] == pytest.approx(3**-0.5 / 2 / np.log(2))


def test_the_running_average_is_evaluated_beside_the_parameters(monkeypatch):
    row = evaluated(monkeypatch, params=3.0, ema=2.0)
    assert (row["eval/loss"], row["eval/ema/loss"]) == (3.0, 2.0)
    assert row["eval/ema/routing/mean_depth"] == row["eval/routing/mean_depth"]
