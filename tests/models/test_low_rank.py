"""Additions of low rank: the sum is what the model computes with, for each pass of a recursion apart too."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive import convert
from adaptive.account import parameters
from adaptive.errors import RecipeError
from adaptive.models import low_rank
from adaptive.models.bodies import recursive
from adaptive.models.depth import expert_choice
from adaptive.recipe import Recipe
from adaptive.recipes.bases import shared, transformer
from adaptive.runs.load import find, load

PLAIN = transformer(layers=8, width=16, heads=2, kv_heads=1, head_dim=8, hidden=24, vocab_size=320)
SHARED = replace(PLAIN, body=shared(PLAIN.body.stack, 3))
TOKENS = jnp.asarray(np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 320)


def with_additions(settings, **options):
    return replace(settings, low_rank=low_rank.Settings(rank=2, scale=0.5, **options))


@nnx.jit
def logits(model):
    return model(TOKENS).logits


def filled(settings):
    """A model whose additions are no zeros."""
    model = settings.build(jax.random.key(0))
    drawn = iter(jax.random.split(jax.random.key(1), 200))
    fill = lambda v: v.replace(0.2 * jax.random.normal(next(drawn), v.shape))  # noqa: E731
    nnx.update(
        model.low_rank, jax.tree.map(fill, nnx.state(model.low_rank), is_leaf=lambda v: isinstance(v, nnx.Param))
    )
    return model


@pytest.mark.compiles
def test_additions_begin_as_nothing():
    model = with_additions(PLAIN).build(jax.random.key(0))
    np.testing.assert_array_equal(logits(model), logits(PLAIN.build(jax.random.key(0))))
    assert parameters(with_additions(PLAIN)).total == sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.compiles
def test_the_model_computes_with_the_sums():
    model = filled(with_additions(PLAIN, on=("*/q", "*/o", "*/down")))
    own, added = model.body.stack.blocks[0], model.low_rank["stack"]["blocks"]["0"]
    plain = PLAIN.build(jax.random.key(0))
    q, out, down = added["mixer"]["q"], added["mixer"]["o"], added["feed_forward"]["down"]
    sums = plain.body.stack.blocks[0]
    sums.mixer.q[...] = own.mixer.q[...] + 0.5 * jnp.einsum("lwr,lrhd->lwhd", q["a"][...], q["b"][...])
    sums.mixer.o[...] = own.mixer.o[...] + 0.5 * jnp.einsum("lhdr,lrw->lhdw", out["a"][...], out["b"][...])
    sums.feed_forward.down[...] = own.feed_forward.down[...] + 0.5 * down["a"][...] @ down["b"][...]
    np.testing.assert_allclose(logits(model), logits(plain), atol=1e-5)
    assert abs(logits(model) - logits(PLAIN.build(jax.random.key(0)))).max() > 0.01


@pytest.mark.compiles
def test_passes_have_additions_of_their_own_and_a_cache():
    routed = replace(SHARED, body=replace(SHARED.body, depth=expert_choice.Settings()))
    model = filled(with_additions(routed, per_pass=True))
    assert {*model.low_rank} == {"core"}
    assert model.low_rank["core"]["blocks"]["0"]["mixer"]["q"]["a"][...].shape == (3, 2, 16, 2)
    whole = model.summed()
    assert whole.settings.body.shared == "none" and whole.low_rank is None
    causal = nnx.jit(lambda model: model(TOKENS, selection="threshold").logits)
    np.testing.assert_allclose(causal(model), causal(whole), atol=1e-5)
    cached, _ = nnx.jit(lambda model: model.prefill(TOKENS, model.init_cache(2, 12)))(model)
    np.testing.assert_allclose(cached.logits, causal(model), atol=1e-4)


@pytest.mark.parametrize("rank", [3, 20])
def test_nearest_is_the_best_of_its_rank(rank):
    residual = np.random.default_rng(0).normal(size=(2, 3, 8, 2, 6)).astype(np.float32)
    shape = low_rank.Shape((2, 3), (8,), (2, 6), ("uses", "layers", "width", "heads", None))
    a, b = low_rank.nearest(residual, shape, rank)
    assert a.shape == (2, 3, 8, rank) and b.shape == (2, 3, rank, 2, 6)
    off = np.linalg.norm(residual.reshape(6, 8, 12) - a.reshape(6, 8, rank) @ b.reshape(6, rank, 12), axis=(1, 2))
    left = np.linalg.svd(residual.reshape(6, 8, 12), compute_uv=False)[:, rank:]
    np.testing.assert_allclose(off, np.linalg.norm(left, axis=1), atol=1e-5)


@pytest.mark.compiles
def test_a_run_is_loaded_as_its_sums(tmp_path):
    model = filled(with_additions(PLAIN))

    class Made:
        settings = model.settings

        def state(self, shapes, place):
            flat = nnx.to_flat_state(nnx.state(model))
            return nnx.from_flat_state([(path, v.replace(place(path, np.asarray(v[...])))) for path, v in flat])

    convert.save(Recipe("tuned", "", model.settings).with_("data=embedded"), Made(), tmp_path / "run")
    found = load(find(tmp_path / "run"))
    assert found.recipe.model == PLAIN
    loaded = nnx.merge(found.graphdef, found.state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(loaded), nnx.state(model.summed()))


def test_what_has_no_passes_and_no_such_matrix_is_refused():
    with pytest.raises(RecipeError, match="no pass of the body shares"):
        with_additions(PLAIN, per_pass=True).validate()
    with pytest.raises(RecipeError, match=r"model.low_rank.on=\*/norm: no matrix .* body/|there are, among others, "):
        with_additions(PLAIN, on=("*/norm",)).build(jax.random.key(0))
    assert isinstance(SHARED.body, recursive.Settings)
