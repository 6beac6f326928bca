"""Models that settings alone make of parts that never heard of each other: each learns, and generates as it learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from flax import nnx
from hnet_models import continued, random_bytes, split_model

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import expert_choice as choosing
from adaptive.layers.stack import Settings as Stack
from adaptive.models.bodies import plain
from adaptive.models.depth import expert_choice

pytestmark = pytest.mark.compiles

ROWS, SEQ, STEPS = 2, 16, 8
CHOSEN = experts.Settings(experts=4, expert_size=12)
SHAPE = {"width": 16, "hidden": 24, "heads": 2, "kv_heads": 1}
MAMBA = shapes.block(mixer="mamba2", feed_forward=None, repeat=3)
INSIDE = shapes.mor(
    depth=expert_choice.Settings(alpha=1.0),
    feed_forward=experts.Settings(choosing.Settings(), experts=4, expert_size=8),
    **SHAPE,
).body


def routed(*runs: shapes.blocks.Settings) -> Stack:
    """A stack of an H-Net's."""
    return Stack(runs, stream="float32", scale_residual=True)


def experts_around_chunks() -> shapes.Model:
    """Experts in the encoder, in the decoder and inside."""
    one = shapes.block(heads=2, kv_heads=0, head_dim=4, feed_forward=CHOSEN)
    base = shapes.hnet(("t1", ("T1",), "t1"), widths=(8, 12))
    inner = plain.Settings(routed(shapes.block(heads=2, kv_heads=0, head_dim=6, feed_forward=CHOSEN, repeat=2)))
    return shapes.with_body(base, encoder=routed(one), inner=inner, decoder=routed(MAMBA, one))


def grouped_queries_around_chunks() -> shapes.Model:
    """Queries in groups, with norms of queries and keys, at every stage."""
    base = shapes.hnet(("t1", ("T1",), "t1"), widths=(8, 12))
    outer = shapes.block(heads=4, kv_heads=2, head_dim=4, qk_norm="head", feed_forward=None)
    inner = shapes.block(heads=4, kv_heads=1, head_dim=4, qk_norm="full", bias=True, window=3)
    return shapes.with_body(base, encoder=routed(outer), inner=plain.Settings(routed(inner)), decoder=routed(outer))


MODELS = {
    "experts in the stages of an H-Net": experts_around_chunks(),
    "grouped queries and their norms in an H-Net": grouped_queries_around_chunks(),
    "Mamba-2 in the core of a MoR": shapes.mor(mixer="mamba2", **SHAPE),
    "three Mamba-2 and one attention in the core of a MoR": shapes.mor(
        2 + 2 * 8, 2, pattern=(MAMBA, shapes.block(heads=2, kv_heads=1, hidden=24)), **SHAPE
    ),
    "experts of every pass": shapes.mor(shared="mixers", feed_forward=CHOSEN, **SHAPE),
    "an H-Net in an H-Net around a MoR of experts that choose": shapes.hnet(
        ("m1", ("t1", (INSIDE,), "m1"), "t1"), widths=(8, 8, 16)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_and_generates_what_it_learned(name):
    """A repeated batch costs less and less; with a cache the trained model says what it says without one."""
    model = MODELS[name]
    graphdef, state = split_model(model)
    params, buffers = nnx.split_state(state, nnx.Param, ...)
    tokens = jnp.asarray(random_bytes(3, ROWS, SEQ + 1) % model.vocab_size)
    tx = optax.adam(1e-2)

    @jax.jit
    def trained(params, buffers):
        def loss(params, buffers, step):
            key = jax.random.fold_in(jax.random.key(0), step)
            out = nnx.merge(graphdef, params, buffers)(tokens[:, :-1], deterministic=False, step=step, key=key)
            ce = optax.softmax_cross_entropy_with_integer_labels(out.logits, tokens[:, 1:]).mean()
            return ce + out.aux.total() + out.aux.separate_total(), (ce, out.trace.sums())

        def step(carry, number):
            params, buffers, opt = carry
            (_, (ce, sums)), grads = jax.value_and_grad(loss, has_aux=True)(params, buffers, number)
            updates, opt = tx.update(grads, opt, params)
            buffers = nnx.merge(graphdef, params, buffers).next_buffers(sums)
            return (optax.apply_updates(params, updates), buffers, opt), ce

        start = params, buffers, tx.init(params)
        (params, buffers, _), losses = jax.lax.scan(step, start, jnp.arange(STEPS))
        after = nnx.merge_state(params, buffers)
        out = nnx.merge(graphdef, after)(tokens[:, :-1], selection="threshold")
        return losses, after, out.logits, out.trace.depth

    losses, after, logits, depth = trained(params, buffers)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3, losses
    got, passes = continued(model, 9)(tokens[:, :-1], after)
    np.testing.assert_array_equal(passes, depth)
    np.testing.assert_allclose(got, logits, atol=3e-4)


def test_every_part_of_a_composition_is_there():
    made = nnx.merge(*split_model(MODELS["an H-Net in an H-Net around a MoR of experts that choose"]))
    assert list(made.routed()) == [f"inner/inner/{part}/blocks/0/feed_forward" for part in ("prelude", "core", "coda")]
    assert made.selections() == ("topk", "threshold") and not made.refuse_cache() and not made.refuse_generation()
    own = nnx.merge(*split_model(MODELS["experts of every pass"])).body.core.blocks[0]
    assert own.mixer.q.shape[:1] == (1,) and own.feed_forward.experts.up.shape[:2] == (3, 1)
    axes = [param.get_metadata()["axes"][0] for param in (own.mixer.q, own.feed_forward.experts.up)]
    assert axes == ["layers", "uses"]
