"""Whole models whose feed-forwards are experts: what they select causally, learn, and refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import continued, forward, split_model

from adaptive.errors import RecipeError
from adaptive.layers import stack as stacks
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice, token_choice
from adaptive.models.bodies import plain

pytestmark = pytest.mark.compiles

SEQ, VOCAB = 24, 40
SHAPE = {"width": 16, "hidden": 24, "heads": 2, "kv_heads": 1, "vocab_size": VOCAB}


def choosing(**options) -> experts.Settings:
    """Experts that choose tokens."""
    return experts.Settings(expert_choice.Settings(**options), experts=4, expert_size=12)


def chosen(**options) -> experts.Settings:
    """Experts that tokens choose."""
    return experts.Settings(token_choice.Settings(**options), experts=4, expert_size=12)


def mixed(feed_forward: experts.Settings) -> shapes.Model:
    """Dense layers first and last, experts between."""
    own = {name: value for name, value in SHAPE.items() if name not in ("width", "vocab_size")}
    dense, routed = shapes.block(**own), shapes.block(**own, feed_forward=feed_forward, repeat=2)
    return shapes.wrapped(plain.Settings(stacks.Settings((dense, routed, dense))), width=16, vocab_size=VOCAB)


MODELS = {
    "ec-threshold": shapes.plain(2, feed_forward=choosing(), **SHAPE),
    "ec-predictor": shapes.plain(2, feed_forward=choosing(decode="predictor"), **SHAPE),
    "ec-chunk": shapes.plain(2, feed_forward=choosing(group="chunk", chunk=6), **SHAPE),
    "ec-position": shapes.plain(2, feed_forward=choosing(group="position"), **SHAPE),
    "ec-select": shapes.plain(2, feed_forward=choosing(select="threshold"), **SHAPE),
    "tc": shapes.plain(2, feed_forward=chosen(), **SHAPE),
    "tc-capacity": shapes.plain(2, feed_forward=chosen(capacity_factor=0.75), **SHAPE),
    "tc-bias-dense-layers": mixed(chosen(bias=True, balance="hf")),
    "mor-ec": shapes.mor(feed_forward=choosing(), **SHAPE),
    "mor-tc": shapes.mor(feed_forward=chosen(), keys_values="shared", **SHAPE),
    "recursive-ec": shapes.recursive(feed_forward=choosing(), **SHAPE),
}
MAY_SEE_NO_FUTURE_IN_TRAINING = ("ec-position", "ec-select", "tc", "tc-bias-dense-layers")


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (4, SEQ), 0, VOCAB)


def counts(out) -> dict[str, np.ndarray]:
    """Experts that computed each token, by the layer's path."""
    return {path: np.asarray(told.per_token["experts"]) for path, told in out.trace.experts().items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_suffix_leaves_causal_selection_alone(name, tokens):
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    for selection in ("threshold", *["topk"] * (name in MAY_SEE_NO_FUTURE_IN_TRAINING)):
        run = forward(MODELS[name], selection=selection)
        before, after = run(tokens), run(changed)
        np.testing.assert_allclose(after.logits[:, :15], before.logits[:, :15], atol=1e-4)
        assert counts(before)
        for path, own in counts(before).items():
            np.testing.assert_array_equal(counts(after)[path][..., :15], own[..., :15])


def test_expert_choice_over_the_sequence_sees_the_future(tokens):
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 7) % VOCAB)
    run = forward(MODELS["ec-threshold"])
    assert np.abs(run(changed).logits[:, :15] - run(tokens).logits[:, :15]).max() > 1e-3


@pytest.mark.parametrize("name", ["ec-threshold", "ec-predictor", "tc-capacity", "tc-bias-dense-layers", "mor-tc"])
def test_generation_equals_the_full_forward(name, tokens):
    full = forward(MODELS[name], selection="threshold")(tokens)
    np.testing.assert_allclose(continued(MODELS[name], 20)(tokens)[0], full.logits, atol=1e-4)
    if name.startswith("ec"):
        assert all(len(np.unique(own)) > 1 for own in counts(full).values()), "the example should select"


def test_a_model_that_sees_the_future_refuses_to_generate(tokens):
    model = nnx.merge(*split_model(shapes.plain(2, feed_forward=choosing(decode="refuse"), **SHAPE)))
    assert model.selections() == ("topk",) and model.refuse_generation() and not model.refuse_cache()
    with pytest.raises(RecipeError, match=r"which do not exist while generating.*decode=threshold or decode=predictor"):
        model.prefill(tokens, model.init_cache(4, SEQ))
    with pytest.raises(RecipeError, match="do not exist while generating"):
        model(tokens, selection="threshold")


def test_every_expert_and_router_learns(tokens):
    for name in ("tc", "mor-ec"):
        graphdef, state = split_model(MODELS[name])
        params, buffers = nnx.split_state(state, nnx.Param, ...)
        loss = lambda p: (nnx.merge(graphdef, p, buffers)(tokens).logits ** 2).mean()  # noqa: B023, E731
        grads = jax.jit(jax.grad(loss))(params)
        for path, grad in nnx.to_flat_state(grads):
            if "feed_forward" in path:
                assert np.all(np.abs(grad[...]).max((-2, -1)) > 0), path


def test_buffers_of_a_recursion_are_its_own(tokens):
    model = nnx.merge(*split_model(MODELS["mor-ec"]))
    out = forward(MODELS["mor-ec"])(tokens)
    router = model.body.core.blocks[0].feed_forward.router
    before = np.asarray(router.threshold[...])
    after = model.next_buffers(out.trace.sums())["body"]["core"]["blocks"][0]["feed_forward"]["router"]
    moved = np.asarray(after["threshold"][...])
    np.testing.assert_array_equal(router.threshold[...], before)
    assert moved.shape == (3, 1, 4)
    np.testing.assert_allclose(moved, out.trace.told["core/blocks/0/feed_forward"].stats["least"], rtol=1e-6)
    assert len(np.unique(moved.round(6)[:, 0, 0])) == 3


def test_experts_choose_among_the_tokens_of_their_recursion(tokens):
    told = forward(MODELS["mor-ec"])(tokens).trace.told["core/blocks/0/feed_forward"]
    for r, capacity in enumerate((24, 16, 8)):
        np.testing.assert_array_equal(told.stats["kept"][r, 0], [len(tokens) * (capacity * 2 // 4)] * 4)
        assert told.stats["tokens"][r, 0] == len(tokens) * capacity


def test_padding_takes_no_expert(tokens):
    segments = jnp.ones_like(tokens).at[:, 17:].set(0)
    told = forward(MODELS["ec-threshold"])(tokens, segment_ids=segments).trace.told["stack/blocks/0/feed_forward"]
    assert not np.asarray(told.per_token["experts"])[..., 17:].any()
    np.testing.assert_array_equal(told.stats["kept"], np.full((2, 4), len(tokens) * (17 * 2 // 4)))


@pytest.mark.parametrize(
    ("options", "layer", "message"),
    [
        ({"experts_per_token": 5}, {}, r"router.experts_per_token=5: must be above 0 and at most .*experts=4"),
        ({"experts_per_token": 0}, {}, r"router.experts_per_token=0: must be at least 1"),
        ({"capacity_factor": -1.0}, {}, r"capacity_factor=-1.0: must be at least 0"),
        ({"groups": 3}, {}, r"groups must divide"),
        ({}, {"experts": 0}, r"feed_forward.experts=0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, layer, message):
    with pytest.raises(RecipeError, match=message):
        shapes.plain(2, feed_forward=dataclasses.replace(chosen(**options), **layer), **SHAPE)


def test_a_router_that_does_not_exist():
    with pytest.raises(RecipeError, match=r"nearest: token_choice"):
        experts.RouterSettings.member("token_chioce")
