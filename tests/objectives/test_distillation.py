"""Learning from a teacher: the divergence, its gradient, what a teacher expects, and which runs cannot teach."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from train_steps import packed_batch

from adaptive.errors import CheckpointError, RecipeError
from adaptive.objectives import distillation, masked_diffusion, next_token
from adaptive.objectives.distillation import Taught, divergence, divergence_sum, expected
from adaptive.recipe import Recipe
from adaptive.training.teacher import teacher_of

ROWS, SEQ, VOCAB, WIDTH = 2, 8, 32, 16


def arrays(seed=0):
    drawn = np.random.default_rng(seed)
    hidden = drawn.normal(size=(ROWS, SEQ, WIDTH)).astype(np.float32)
    weight = drawn.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    mask = (drawn.random((ROWS, SEQ)) < 0.7).astype(np.float32)
    return hidden, weight, mask


@pytest.mark.compiles
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_with_all_tokens_it_is_the_divergence_of_the_distributions(cap):
    hidden, weight, mask = arrays()
    theirs = arrays(1)[0]

    def log_probabilities(hidden):
        logits = hidden @ weight.T
        return jax.nn.log_softmax(cap * jnp.tanh(logits / cap) if cap else logits)

    def exact(hidden):
        p, q = log_probabilities(theirs), log_probabilities(hidden)
        return ((jnp.exp(p) * (p - q)).sum(-1) * mask).sum()

    def ours(hidden):
        taught = expected(theirs, weight, VOCAB - 1, 4, cap)
        return divergence_sum(hidden, weight, taught, mask, 2, cap)

    (value, gradient), (expect, slope) = (jax.jit(jax.value_and_grad(f))(hidden) for f in (ours, exact))
    np.testing.assert_allclose(value, expect, rtol=1e-4)
    np.testing.assert_allclose(gradient, slope, atol=2e-4 * abs(slope).max())


@pytest.mark.compiles
def test_others_are_one_event():
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.2, 0.3, 0.3])
    kept = divergence(jnp.log(p[:2]), jnp.log(q[:2]))
    np.testing.assert_allclose(kept, 0.5 * np.log(2.5) + 0.3 * np.log(1.5) + 0.2 * np.log(0.2 / 0.6), rtol=1e-5)
    assert abs(divergence(jnp.log(p[:2]), jnp.log(p[:2]))) < 1e-6


@pytest.mark.compiles
def test_the_loss_is_a_share_of_both_and_without_a_teacher_the_cross_entropy():
    model = shapes.plain(1, vocab_size=VOCAB, width=WIDTH, hidden=24, heads=2, kv_heads=1).build(jax.random.key(0))
    aim, batch = distillation.Settings(teacher="run", share=0.25, kept=4), packed_batch(ROWS, SEQ, VOCAB)
    out = model(jnp.asarray(batch.tokens), logits=False)
    taught = expected(arrays()[0], model.head_weight(), 4, SEQ)
    both, plain, untaught = (
        one.loss(model, out, one.inputs(given, None), 0)
        for one, given in ((aim, batch._replace(taught=taught)), (next_token.Settings(), batch), (aim, batch))
    )
    assert untaught.total == plain.total == both.main
    np.testing.assert_allclose(both.total, 0.75 * plain.total + 0.25 * both.apart["teacher"], rtol=1e-6)


def test_what_cannot_teach_is_refused(monkeypatch, tmp_path):
    recipe = Recipe("student", "", shapes.plain(1)).with_("data=embedded", "objective=distillation")
    with pytest.raises(RecipeError, match="needs a teacher"):
        recipe.validate()
    with pytest.raises(RecipeError, match="at most 2 can be kept"):
        distillation.Settings(teacher="run", kept=3).check(3)
    taught = recipe.with_(f"objective.teacher={tmp_path / 'none'}")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        teacher_of(taught)
    other = replace(recipe, model=replace(recipe.model, vocab_size=7), objective=next_token.Settings())
    hiding = replace(recipe, objective=masked_diffusion.Settings())
    for found, wrong in (
        (other, "predicts 7 tokens"),
        (hiding, "masked_diffusion, and a teacher"),
        (recipe.with_("data.tokenizer=hnet-bytes"), "needs the same"),
    ):
        named = type("Found", (), {"recipe": found})
        monkeypatch.setattr("adaptive.training.teacher.find", lambda *_, named=named, **__: named)
        with pytest.raises(RecipeError, match=wrong):
            teacher_of(taught)
    assert teacher_of(other) is None
    assert Taught._fields == ("tokens", "nats")
