"""What routers decided once is decided again: in generation, in another pass, with other parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.errors import RecipeError
from adaptive.inference.sampling import Sampler
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.base import Context
from adaptive.layers.moe.layer import MoE, routed_layer
from adaptive.layers.moe.routers import token_choice
from adaptive.layers.moe.settings import MoESettings, RouterSettings
from adaptive.layers.site import Site
from adaptive.routing.replay import packed, together, unpacked

pytestmark = pytest.mark.compiles

EXPERTS = experts.Settings(token_choice.Settings(experts_per_token=2), experts=5, expert_size=8)
INNER = shapes.mor(2, 2, ends=0, width=16, hidden=16, heads=2, kv_heads=1, feed_forward=EXPERTS).body
MODEL = shapes.hnet(("t1", INNER, "t1"), widths=(8, 16))
PROMPTS = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"a cat sat, ", b"one")]
SIZES = {"duo_llm": {"experts": 2}, "versatile": {"experts": 4}}
OWN = {"versatile": {"hidden": 32}}


def equal(a, b):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_generation_is_replayed():
    """Chunks, depths and experts of rows of different lengths: the same with other parameters, and logits to the bit
    with the same."""
    graphdef, state = split_model(MODEL)
    pieces = list(Sampler(graphdef, state, record=True)(PROMPTS, 8, jax.random.key(1), at_once=4))
    record = together([piece.record for piece in pieces], [piece.valid for piece in pieces])
    exists = np.concatenate([piece.valid for piece in pieces], axis=1)
    tokens = np.zeros((2, exists.sum(1).max()), np.int32)
    for row, piece in enumerate(np.concatenate([piece.tokens for piece in pieces], axis=1)):
        tokens[row, : exists[row].sum()] = piece[exists[row]]
    valid = np.arange(tokens.shape[1]) < exists.sum(1)[:, None]
    assert record.chunks.shape == (1, *tokens.shape) and record.passes.shape == (2, *tokens.shape)
    assert record.experts[0] is None and record.experts[1].shape == (2, 1, *tokens.shape)
    assert 0 < record.passes[1].sum() < record.passes[0].sum() == record.chunks[0].sum() < valid.sum()

    @jax.jit
    def run(state, replay):
        model = nnx.merge(graphdef, state)
        out = model(tokens, valid=valid, selection="threshold", replay=replay)
        return out.logits, model.recorded(out.trace, tokens.shape)

    logits, found = run(state, None)
    assert equal(found, record)  # what generation decides is what a forward pass does
    np.testing.assert_array_equal(run(state, record)[0], logits)
    others = jax.tree.map(lambda a: 0.8 * a + 0.02, state)
    assert not equal(run(others, None)[1], record) and equal(run(others, record)[1], record)
    assert np.isfinite(run(others, record)[0]).all()


def test_every_router_of_experts_follows():
    """The choices of one input for another."""

    @jax.jit
    def run():
        told = {}
        one, two = (jax.random.normal(jax.random.key(i), (2, 12, 16)) for i in range(2))
        for i, kind in enumerate(RouterSettings.kinds()):
            sizes = {"experts": 6, "expert_size": 8} | SIZES.get(kind, {})
            config = MoESettings(RouterSettings.member(kind)(**OWN.get(kind, {})), **sizes)
            layer = routed_layer(config, Site(16, std=0.5), jax.random.key(i))
            decided = layer.router if isinstance(layer, MoE) else lambda *a, layer=layer: layer.routed(*a)[1]
            # In training duo_llm mixes its experts.
            context = Context(selection="threshold" if kind == "duo_llm" else "topk")
            chosen, choices = decided(one, context).chosen(), config.choices + layer.further
            replay = context._replace(replayed=chosen[..., :choices], kept=chosen[..., choices:])
            told[kind] = chosen, decided(two, replay).chosen()
        return told

    for kind, (chosen, replayed) in run().items():
        np.testing.assert_array_equal(chosen, replayed, err_msg=kind)
        assert kind == "acm" or (chosen != chosen[:1, :1]).any(), kind


def test_choices_are_packed_as_bits():
    mask = np.random.default_rng(0).random((2, 3, 70)) < 0.5
    words = packed(jnp.asarray(mask))
    assert len(words) == 3
    np.testing.assert_array_equal(unpacked(jnp.stack([words[name] for name in sorted(words)]), 70), mask)


def test_a_trace_that_does_not_say_it_is_refused():
    model = shapes.plain(1, feed_forward=EXPERTS)
    graphdef, state = split_model(model)

    def trained(replay=None):
        return nnx.merge(graphdef, state)(jnp.zeros((1, 4), jnp.int32), deterministic=replay is not None, replay=replay)

    with pytest.raises(RecipeError, match="does not say which experts were chosen"):
        jax.eval_shape(lambda: trained(trained().trace))
