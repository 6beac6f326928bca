"""Losses of masked diffusion against their formulas written out in numpy, and what the objective reads."""

import jax
import numpy as np
import pytest
from train_steps import packed_batch

from adaptive.data.batch import Batch
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import RecipeError
from adaptive.objectives import masked_diffusion
from adaptive.recipe import Recipe
from adaptive.runs.mask_token import check_mask, with_mask

pytestmark = pytest.mark.compiles

ROWS, SEQ, VOCAB, MASK = 3, 7, 11, 10


@pytest.fixture(scope="module")
def case():
    """(logits, tokens, masked, t): one row all hidden, one with a single token hidden."""
    r = np.random.default_rng(0)
    masked = r.random((ROWS, SEQ)) < 0.5
    masked[0], masked[1] = True, np.arange(SEQ) == 4
    logits = r.normal(0, 2, (ROWS, SEQ, VOCAB)).astype(np.float32)
    return logits, r.integers(0, MASK, (ROWS, SEQ)), masked, np.array([0.9, 0.05, 0.4], np.float32)


def nats(logits, tokens):
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens[..., None], -1)[..., 0]


def slope(of, logits, at, by=1e-3):
    """The derivative of `of` at one logit, by differences."""
    more, less = logits.astype(np.float64), logits.astype(np.float64)
    more[at] += by
    less[at] -= by
    return (of(more) - of(less)) / (2 * by)


def assert_same(ours, theirs, logits):
    """Value and gradient at a few logits."""
    value, gradient = jax.jit(jax.value_and_grad(ours))(logits)
    assert value == pytest.approx(theirs(logits), abs=1e-5)
    for at in [(0, 1, 2), (1, 4, 3), (1, 0, 0), (2, 6, MASK)]:
        assert gradient[at] == pytest.approx(slope(theirs, logits, at), abs=2e-4 * float(np.abs(gradient).max()))


def exact(logits, tokens, masked, stable):
    total = 0.0
    for ce, hidden in zip(nats(logits, tokens), masked, strict=True):
        total += sum(ce[hidden]) / (1 if stable else hidden.sum() / SEQ)
    return total / (ROWS * SEQ)


def timed(logits, tokens, masked, t, prompt):
    total = 0.0
    for ce, hidden, at, p in zip(nats(logits, tokens), masked, t, prompt or [0] * ROWS, strict=True):
        own = [c / (0.999 * at + 0.001) for i, c in enumerate(ce) if hidden[i] and i >= p]
        total += sum(own) / (SEQ - p)
    return total / ROWS


def log_linear(logits, tokens, masked, t):
    without = np.where(np.arange(VOCAB) == MASK, -np.inf, logits)
    weight = (0.999 / (1 - 0.999 * t)) / (1 / (1 - 0.999 * t) - 1)
    return (nats(without, tokens) * masked * weight[:, None]).mean()


@pytest.mark.parametrize("stable", [False, True])
def test_ecdlm(case, stable):
    logits, tokens, masked, _ = case
    ours = lambda x: masked_diffusion.ecdlm_loss(x, tokens, masked, stable)  # noqa: E731
    assert_same(ours, lambda x: exact(x, tokens, masked, stable), logits)


@pytest.mark.parametrize("prompt", [None, [2, 5, 0]])
def test_llada(case, prompt):
    logits, tokens, masked, t = case
    given = None if prompt is None else np.array(prompt)
    ours = lambda x: masked_diffusion.llada_loss(x, tokens, masked, t, prompt_length=given)  # noqa: E731
    assert_same(ours, lambda x: timed(x, tokens, masked, t, prompt), logits)


def test_mdlm(case):
    logits, tokens, masked, t = case
    noisy = np.where(masked, MASK, tokens)
    ours = lambda x: masked_diffusion.mdlm_loss(x, noisy, tokens, t, MASK)  # noqa: E731
    assert_same(ours, lambda x: log_linear(x, tokens, masked, t), logits)


def test_what_is_read_stays_and_the_mask_is_never_predicted(case):
    logits, tokens, masked, t = case
    log_p = np.asarray(masked_diffusion.subs_log_probs(logits, np.where(masked, MASK, tokens), MASK))
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    assert (log_p[..., MASK] < -1e5).all()
    assert (np.take_along_axis(log_p, tokens[..., None], -1)[..., 0][~masked] == 0).all()
    sigma, rate = masked_diffusion.log_linear_noise(t)
    np.testing.assert_allclose(1 - np.exp(-sigma), 0.999 * t, rtol=1e-5)
    np.testing.assert_allclose(rate / np.expm1(sigma), 1 / t, rtol=1e-5)


def test_a_row_with_nothing_hidden_adds_nothing(case):
    logits, tokens, _, _ = case
    value, gradient = jax.jit(jax.value_and_grad(masked_diffusion.ecdlm_loss))(
        logits, tokens, np.zeros((ROWS, SEQ), bool)
    )
    assert value == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("change", ["weighting=llada", "weighting=mdlm", "draws=independent", "draws=antithetic",
                                    "stable=true", "complementary=true", "mask_id=9", "eps=0.1"])  # fmt: skip
def test_a_setting_changes_what_is_trained(change):
    batch = packed_batch(ROWS + 1, SEQ, MASK)
    name, value = change.split("=")
    first = ["objective.weighting=llada"] if name == "eps" else []
    recipe = Recipe(name="made").with_("objective=masked_diffusion", "objective.mask_id=10", *first)
    shown = []
    for one in (recipe, recipe.with_(f"objective.{name}={value}")):
        made = jax.make_jaxpr(lambda key, aim=one.objective: aim.inputs(batch, key)[:3])(jax.random.key(0))
        shown.append((str(made), one.objective.never))
    assert shown[0] != shown[1]


def test_settings_that_cannot_work_are_refused():
    aim = masked_diffusion.Settings
    for wrong, words in (
        (aim(mask_id=40), "model.vocab_size=41"),
        (aim(weighting="mdlm", stable=True), "objective.stable"),
        (aim(weighting="llada", complementary=True), "objective.complementary"),
    ):
        with pytest.raises(RecipeError, match=words):
            wrong.check(32)


def test_the_mask_is_the_tokenizers_or_the_first_id_behind_it():
    recipe = Recipe(name="made").with_("objective=masked_diffusion")
    assert with_mask(recipe).objective.mask_id == load_tokenizer("bytes").mask_id == 258
    other = recipe.with_("data.tokenizer=hnet-bytes", "model.vocab_size=256")
    with pytest.raises(RecipeError, match=r"model.vocab_size=257 or more"):
        with_mask(other)
    assert with_mask(other.with_("model.vocab_size=264")).objective.mask_id == 256
    with pytest.raises(RecipeError, match="stands for no text, such as its own, 258"):
        check_mask(recipe.with_("objective.mask_id=97"), load_tokenizer("bytes"))
    check_mask(with_mask(recipe), load_tokenizer("bytes"))
    assert with_mask(Recipe(name="made")) == Recipe(name="made")


def test_prompts_and_padding_are_never_hidden():
    """A document with a prompt of 3 tokens, the rest of another, padding."""
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    places = np.array([[0, 1, 2, 3, 4, 0, 1, 0]])
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 0]], np.float32)
    tokens = np.arange(8)[None]
    counted = masked_diffusion.Settings().counted(Batch(tokens, tokens, places, segments, mask))
    assert counted[0].tolist() == [False, False, False, True, True, True, True, False]
