"""Routing by depth inside an H-Net: on chunks it is what it is on an ordinary sequence of that many vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from adaptive.layers.moe_config import MoEConfig
from adaptive.models.config import RouterConfig
from flax import nnx
from hnet_models import BATCH, SEQ, composed, forward, hnet, random_bytes, split_model

from adaptive.layers.site import Buffer
from adaptive.layers.stack import Places

pytestmark = pytest.mark.compiles

CHUNKS, CAPACITY = 6, 16
EXPERT = RouterConfig(kind="expert_choice", alpha=1.0, z_coefficient=0.1)
AUXILIARY = RouterConfig(kind="expert_choice", sampling="aux_router", alpha=1.0)
TOKEN = RouterConfig(kind="token_choice", activation="softmax", alpha=1.0, z_coefficient=0.1)
FREE = RouterConfig(kind="token_choice", activation="sigmoid", alpha=1.0, balancing="loss_free")
CAPPED = RouterConfig(
    kind="token_choice", activation="softmax", alpha=1.0, execution="capacity", capacities=(1.0, 0.5, 0.34)
)
ROUTERS = {
    "recursive": RouterConfig(), "expert": EXPERT, "auxiliary": AUXILIARY, "token": TOKEN, "loss-free": FREE,
    "token in slots": CAPPED,
}  # fmt: skip
MOE = MoEConfig("token_choice", expert_size=16, experts=4, experts_per_token=2)
STRIDE = {"chunkers": ("stride",), "ratio_targets": (4.0,)}


@functools.cache
def backbone(config, selection):
    """(x [batch, n, width], arrays) -> Output of the inner model alone."""
    graphdef, state = split_model(config)

    def run(state, x, arrays):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return nnx.merge(graphdef, state).main.apply(x, positions, selection=selection, **arrays)

    compiled = quick.jit(run)
    return lambda x, **arrays: compiled(state, x, arrays)


def vectors(n=CHUNKS):
    return np.random.default_rng(4).normal(size=(BATCH, n, 16)).astype(np.float32)


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("name", ROUTERS)
def test_slots_that_hold_nothing_change_nothing(name, selection):
    """6 vectors in 16 slots: outputs, selections, losses and statistics of a sequence of 6."""
    config = composed(ROUTERS[name])
    x = vectors()
    slots = np.full((BATCH, CAPACITY, 16), 3.0, np.float32)
    slots[:, :CHUNKS] = x
    valid = np.broadcast_to(np.arange(CAPACITY) < CHUNKS, (BATCH, CAPACITY))
    got, want = backbone(config, selection)(slots, valid=valid), backbone(config, selection)(x)
    np.testing.assert_allclose(got.hidden[:, :CHUNKS], want.hidden, atol=2e-5)
    np.testing.assert_array_equal(got.trace.depth[:, :CHUNKS], want.trace.depth)
    for a, b in zip(got.trace.selections, want.trace.selections, strict=True):
        for row in range(BATCH):
            own, exact = np.asarray(a.valid[row]), np.asarray(b.valid[row])
            np.testing.assert_array_equal(a.indices[row][own], b.indices[row][exact])
            np.testing.assert_allclose(a.weights[row][own], b.weights[row][exact], atol=1e-6)
    assert got.aux.keys() == want.aux.keys()
    for loss, aux in want.aux.items():
        np.testing.assert_allclose(got.aux[loss].value, aux.value, rtol=1e-5, err_msg=loss)
    for key, value in (want.trace.scalars or {}).items():
        if key != "mean_depth":  # which an H-Net counts over its bytes
            np.testing.assert_allclose(got.trace.scalars[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    if want.trace.load is not None:
        np.testing.assert_allclose(got.trace.load, want.trace.load, rtol=1e-6)


@pytest.mark.parametrize("name", ["expert", "token", "loss-free"])
def test_rows_with_different_numbers_of_chunks(name):
    """Row 0 holds 6 vectors, row 1 holds 3: each row as if alone."""
    config, x = composed(ROUTERS[name]), vectors()
    valid = np.arange(CHUNKS) < np.array([[6], [3]])
    both = backbone(config, "topk")(np.where(valid[..., None], x, 9.0), valid=valid)
    for row, n in enumerate((6, 3)):
        alone = backbone(config, "topk")(x[row : row + 1, :n])
        np.testing.assert_allclose(both.hidden[row, :n], alone.hidden[0], atol=2e-5)
        np.testing.assert_array_equal(both.trace.depth[row, :n], alone.trace.depth[0])


@pytest.mark.parametrize("name", ["expert", "token"])
def test_chunks_of_an_hnet_are_such_a_sequence(name):
    """Strides of 4 over 24 bytes in 24 slots: the inner model is told of 6 vectors, and the trace of 24 bytes."""
    config = composed(ROUTERS[name], hnet_settings=STRIDE)
    tokens = random_bytes()
    out = forward(config)(tokens)
    graphdef, state = split_model(config)

    @quick.jit
    def chunks(state):
        model = nnx.merge(graphdef, state)
        places = Places(jnp.broadcast_to(jnp.arange(SEQ, dtype=jnp.int32), tokens.shape))
        h = model.stages[0].encoder(model.embedding[...][tokens], places)[0][:, ::4]
        return jnp.concatenate([h, jnp.broadcast_to(model.main_pad[...], (*h.shape[:2], 8))], axis=-1)

    want = backbone(config, "topk")(chunks(state))
    np.testing.assert_array_equal(out.trace.depth[:, ::4], want.trace.depth)
    assert not np.any(np.delete(np.asarray(out.trace.depth), np.s_[::4], axis=1))
    for loss, aux in want.aux.items():
        np.testing.assert_allclose(out.aux[loss].value, aux.value, rtol=1e-4, err_msg=loss)
    for scores, exact in zip(out.trace.scores, want.trace.scores, strict=True):
        np.testing.assert_allclose(scores[:, ::4], exact, atol=1e-5)
        assert np.isnan(np.delete(np.asarray(scores), np.s_[::4], axis=1)).all()
    assert out.trace.scalars["mean_depth"] == pytest.approx(np.asarray(want.trace.depth).sum() / tokens.size)
    assert out.trace.scalars["chunks_per_byte"] == 1 / 4


@pytest.mark.parametrize("name", ["expert", "token", "token in slots"])
def test_a_byte_is_blind_to_the_future_as_it_generates(name):
    config, tokens = composed(ROUTERS[name], hnet_settings={"capacities": (0.3,)}), random_bytes()
    other = tokens.copy()
    other[1, 10] = ord("z")
    run = forward(config, selection="threshold")
    a, b = run(tokens), run(other)
    np.testing.assert_allclose(a.logits[1, :10], b.logits[1, :10], atol=1e-5)
    assert np.abs(a.logits - b.logits)[1, 10:].max() > 1e-2


def test_packed_documents_are_blind_to_each_other():
    segments = np.repeat([1, 2], [7, 17])[None].repeat(BATCH, 0).astype(np.int32)
    tokens, run = random_bytes(), forward(composed(TOKEN))
    packed, alone = run(tokens, segment_ids=segments), run(np.roll(tokens, -7, axis=1))
    np.testing.assert_allclose(packed.logits[:, 7:], alone.logits[:, :17], atol=1e-4)


# Experts inside


def test_experts_see_chunks_alone():
    """Slots that hold nothing are routed nowhere: loads, losses and outputs of 6 vectors."""
    config = composed(TOKEN, moe=MOE)
    x = vectors()
    slots = np.full((BATCH, CAPACITY, 16), 3.0, np.float32)
    slots[:, :CHUNKS] = x
    valid = np.broadcast_to(np.arange(CAPACITY) < CHUNKS, (BATCH, CAPACITY))
    got, want = backbone(config, "topk")(slots, valid=valid), backbone(config, "topk")(x)
    np.testing.assert_allclose(got.hidden[:, :CHUNKS], want.hidden, atol=2e-5)
    for loss, aux in want.aux.items():
        np.testing.assert_allclose(got.aux[loss].value, aux.value, rtol=1e-5, err_msg=loss)
    for part, calls in want.trace.experts.items():
        for name, value in calls.stats.items():
            np.testing.assert_allclose(got.trace.experts[part].stats[name], value, rtol=1e-5, err_msg=name)


def test_everything_learns_and_buffers_move():
    config = composed(FREE, moe=MOE, hnet_settings={"capacities": (0.6,)})
    graphdef, params, buffers = nnx.split(nnx.merge(*split_model(config)), nnx.Param, ...)
    tokens = random_bytes()

    @quick.jit
    def step(params):
        def loss(params):
            out = nnx.merge(graphdef, params, buffers)(tokens, deterministic=False, key=jax.random.key(0))
            weights = jnp.cos(jnp.arange(out.logits.size).reshape(out.logits.shape))
            return (out.logits * weights).mean() + out.aux.total(), out.trace.sums()

        grads, sums = jax.grad(loss, has_aux=True)(params)
        return grads, nnx.merge(graphdef, params, buffers).next_buffers(sums)

    grads, after = step(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), jax.tree_util.keystr(path)
    before = nnx.state(nnx.merge(graphdef, params, buffers), Buffer)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    bias = np.asarray(after["main"]["router_bias"][...])
    assert np.any(bias) and np.all(np.isfinite(bias))
    assert nnx.merge(graphdef, params, buffers).experts() is not None
    assert nnx.merge(*split_model(hnet(1))).experts() is None
