"""A language model decoded with and without caches."""

import jax
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.errors import UserError
from adaptive.inference.diffusion import decode
from adaptive.inference.diffusion.caches import block as blocks
from adaptive.inference.diffusion.caches import delayed, dual, none
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.network import Model, check_cache, starved
from adaptive.models.depth import expert_choice
from adaptive.objectives import Denoising
from adaptive.recipe import load

pytestmark = pytest.mark.compiles

VOCAB, MASK = 20, 19
SHAPE = {"width": 16, "heads": 2, "hidden": 32, "vocab_size": VOCAB, "init_std": 0.3, "embedding_std": 1.0}
SETTINGS = shapes.plain(2, **SHAPE)
PROMPTS = [np.random.default_rng(r).integers(0, MASK, n) for r, n in ((1, 6), (2, 3))]


@pytest.fixture(scope="module")
def model():
    return split_model(SETTINGS)


def decoder(model, how, cache, **options):
    plan = Plan(MASK, 8, 8, 4, **options)
    return Decoder(Model(*model, how, cached=not isinstance(cache, none.Settings)), plan, cache)


def test_without_a_cache_it_is_decode_with_the_forward_pass(model):
    forward = jax.jit(lambda tokens: nnx.merge(*model)(tokens, sees="all").logits)
    found = decoder(model, Denoising(MASK, 0, False), none.Settings(), guidance=0.5)(PROMPTS)
    for r, prompt in enumerate(PROMPTS):
        options = {"mask_id": MASK, "steps": 8, "block": 4, "guidance": 0.5}
        alone, calls = decode(forward, prompt[None], 8, **options)
        assert (alone[0] == found.tokens[r, : found.lengths[r]]).all() and calls == found.row_calls[r]


def test_a_cache_that_computes_everything_changes_nothing(model):
    how = Denoising(MASK, 0, False)
    plain, kept, both = (
        decoder(model, how, cache)(PROMPTS) for cache in (none.Settings(), delayed.Settings(refresh=1), dual.Settings())
    )
    assert (plain.tokens == kept.tokens).all() and (plain.written == kept.written).all()
    assert both.computed.sum() < plain.computed.sum() / 1.5 and both.calls == plain.calls


@pytest.mark.parametrize("shifted", [False, True], ids=["same", "shifted"])
def test_the_cache_of_blocks_is_exact(model, shifted):
    how = Denoising(MASK, 4, shifted)
    plain, kept = (decoder(model, how, cache)(PROMPTS) for cache in (none.Settings(), blocks.Settings()))
    assert (plain.tokens == kept.tokens).all() and (plain.written == kept.written).all()
    assert len(np.unique(kept.tokens[0])) > 3
    assert (kept.computed < plain.computed / 2).all()


def test_what_a_model_cannot_do(model):
    with pytest.raises(UserError, match="cache block is for block diffusion, and the model is of masked"):
        decoder(model, Denoising(MASK, 0, False), blocks.Settings())
    with pytest.raises(UserError, match="block=4: the model was trained on blocks of 3"):
        decoder(model, Denoising(MASK, 3, False), blocks.Settings())
    with pytest.raises(UserError, match="cache dual computes some positions alone"):
        check_cache(shapes.mor(5, 3, expert_choice.Settings(), **SHAPE), dual.Settings())


def test_experts_that_choose_among_few_positions():
    settings = load("dlm_ec_tiny").model
    assert "16 experts choose among the 2 positions of a call, and take 8 of each token rather than 4" in starved(
        settings, 2
    )
    assert not starved(settings, 64) and not starved(SETTINGS, 2)
