"""Routing by depth inside an H-Net: on chunks it is what it is on an ordinary sequence of that many vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import BATCH, composed, forward, hnet, random_bytes, split_model

from adaptive.layers.call import Call
from adaptive.layers.feed_forwards import experts
from adaptive.layers.site import Buffer
from adaptive.layers.state import clear, put, take
from adaptive.layers.where import Where
from adaptive.models.depth import expert_choice, token_choice

pytestmark = pytest.mark.compiles

CHUNKS, CAPACITY = 6, 16
EXPERT = expert_choice.Settings(alpha=1.0, z_coefficient=0.1)
TOKEN = token_choice.Settings(z_coefficient=0.1)
FREE = token_choice.Settings(activation="sigmoid", balancing="loss_free")
DEPTHS = {
    "expert": EXPERT,
    "auxiliary": expert_choice.Settings(sampling="aux_router", alpha=1.0),
    "token": TOKEN,
    "loss-free": FREE,
    "token in slots": token_choice.Settings(execution="capacity", capacities=(1.0, 0.5, 0.34)),
}
MOE = experts.Settings(experts=4, expert_size=16)
STRIDE = {"chunker": "stride", "target": 4.0}


@functools.cache
def inside(model, rule):
    """(x [batch, n, width], exists) -> Through of the body inside, alone."""
    graphdef, state = split_model(model)

    @jax.jit
    def run(state, x, exists):
        where = Where.whole(x.shape[:2], None, None, exists)
        return nnx.merge(graphdef, state).body.inner(x, where, Call(rule=rule))

    return lambda x, exists=None: run(state, x, exists)


def vectors(n=CHUNKS):
    return np.random.default_rng(4).normal(size=(BATCH, n, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("auxiliary", "train"), ("loss-free", "train"), ("token in slots", "train"), ("expert", "causal")],
)
def test_slots_that_hold_nothing_change_nothing(name, rule):
    """6 vectors in 16 slots: outputs, selections, losses and statistics of a sequence of 6."""
    model, x = composed(DEPTHS[name]), vectors()
    slots = np.full((BATCH, CAPACITY, 16), 3.0, np.float32)
    slots[:, :CHUNKS] = x
    exists = np.broadcast_to(np.arange(CAPACITY) < CHUNKS, (BATCH, CAPACITY))
    got, want = inside(model, rule)(slots, exists), inside(model, rule)(x)
    np.testing.assert_allclose(got.hidden[:, :CHUNKS], want.hidden, atol=1e-4)
    np.testing.assert_array_equal(got.trace.depth[:, :CHUNKS], want.trace.depth)
    for a, b in zip(got.trace.selections, want.trace.selections, strict=True):
        for row in range(BATCH):
            own, exact = np.asarray(a.valid[row]), np.asarray(b.valid[row])
            np.testing.assert_array_equal(a.indices[row][own], b.indices[row][exact])
            np.testing.assert_allclose(a.weights[row][own], b.weights[row][exact], atol=1e-5)
    assert got.aux.keys() == want.aux.keys()
    for loss, aux in want.aux.items():
        np.testing.assert_allclose(got.aux[loss].value, aux.value, rtol=1e-4, err_msg=loss)
    for key, value in (want.trace.scalars or {}).items():
        if key != "mean_depth":  # which an H-Net counts over its bytes
            np.testing.assert_allclose(got.trace.scalars[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    if want.trace.load is not None:
        np.testing.assert_allclose(got.trace.load, want.trace.load, rtol=1e-6)


@pytest.mark.parametrize("name", ["expert", "loss-free"])
def test_rows_with_different_numbers_of_chunks(name):
    """Row 0 holds 6 vectors, row 1 holds 3: each row as if alone."""
    model, x = composed(DEPTHS[name]), vectors()
    exists = np.arange(CHUNKS) < np.array([[6], [3]])
    both = inside(model, "train")(np.where(exists[..., None], x, 9.0), exists)
    for row, n in enumerate((6, 3)):
        alone = inside(model, "train")(x[row : row + 1, :n])
        np.testing.assert_allclose(both.hidden[row, :n], alone.hidden[0], atol=1e-4)
        np.testing.assert_array_equal(both.trace.depth[row, :n], alone.trace.depth[0])


@pytest.mark.parametrize("name", ["expert", "token"])
def test_chunks_of_an_hnet_are_such_a_sequence(name):
    """Strides of 4 over 24 bytes in 24 slots: the inner model is told of 6 vectors, and the trace of 24 bytes."""
    model, tokens = composed(DEPTHS[name], outside=STRIDE), random_bytes()
    out = forward(model)(tokens)
    graphdef, state = split_model(model)

    @jax.jit
    def chunks(state):
        made = nnx.merge(graphdef, state)
        h = made.body.encoder(made.embedding[...][tokens], Where.whole(tokens.shape), Call())[0][:, ::4]
        return jnp.concatenate([h, jnp.broadcast_to(made.body.pad[...], (*h.shape[:2], 8))], axis=-1)

    want = inside(model, "train")(chunks(state))
    np.testing.assert_array_equal(out.trace.depth[:, ::4], want.trace.depth)
    assert not np.any(np.delete(np.asarray(out.trace.depth), np.s_[::4], axis=1))
    for loss, aux in want.aux.items():
        np.testing.assert_allclose(out.aux[loss].value, aux.value, rtol=1e-3, err_msg=loss)
    for scores, exact in zip(out.trace.scores, want.trace.scores, strict=True):
        np.testing.assert_allclose(scores[:, ::4], exact, atol=1e-4)
        assert np.isnan(np.delete(np.asarray(scores), np.s_[::4], axis=1)).all()
    assert out.trace.scalars["mean_depth"] == pytest.approx(np.asarray(want.trace.depth).sum() / tokens.size)
    assert out.trace.scalars["chunks_per_byte"] == 1 / 4


@pytest.mark.parametrize("name", ["expert", "token", "token in slots"])
def test_a_byte_is_blind_to_the_future_as_it_generates(name):
    model, tokens = composed(DEPTHS[name], outside={"capacities": (0.3,)}), random_bytes()
    other = tokens.copy()
    other[1, 10] = ord("z")
    run = forward(model, selection="threshold")
    a, b = run(tokens), run(other)
    np.testing.assert_allclose(a.logits[1, :10], b.logits[1, :10], atol=1e-4)
    assert np.abs(a.logits - b.logits)[1, 10:].max() > 1e-2


def test_packed_documents_are_blind_to_each_other():
    segments = np.repeat([1, 2], [7, 17])[None].repeat(BATCH, 0).astype(np.int32)
    tokens, run = random_bytes(), forward(composed(TOKEN))
    packed, alone = run(tokens, segment_ids=segments), run(np.roll(tokens, -7, axis=1))
    np.testing.assert_allclose(packed.logits[:, 7:], alone.logits[:, :17], atol=2e-4)


# Experts inside


def test_experts_see_chunks_alone():
    """Slots that hold nothing are routed nowhere: loads and outputs of 6 vectors."""
    model, x = composed(TOKEN, feed_forward=MOE), vectors()
    slots = np.full((BATCH, CAPACITY, 16), 3.0, np.float32)
    slots[:, :CHUNKS] = x
    exists = np.broadcast_to(np.arange(CAPACITY) < CHUNKS, (BATCH, CAPACITY))
    got, want = inside(model, "train")(slots, exists), inside(model, "train")(x)
    np.testing.assert_allclose(got.hidden[:, :CHUNKS], want.hidden, atol=1e-4)
    assert got.trace.experts().keys() == want.trace.experts().keys() and want.trace.experts()
    for path, told in want.trace.experts().items():
        of = lambda told: told.stats | {name: loss.value for name, loss in told.losses.items()}  # noqa: E731
        for name, value in of(told).items():
            other = of(got.trace.told[path])[name]
            np.testing.assert_allclose(other, value, rtol=1e-4, atol=1e-5, err_msg=f"{path} {name}")


def test_buffers_move():
    model = composed(FREE, feed_forward=MOE, outside={"capacities": (0.6,)})
    graphdef, state = split_model(model)

    @jax.jit
    def following(state):
        made = nnx.merge(graphdef, state)
        out = made(random_bytes(), deterministic=False, key=jax.random.key(0), logits=False)
        return made.next_buffers(out.trace.sums())

    made, after = nnx.merge(graphdef, state), following(state)
    assert jax.tree.structure(nnx.state(made, Buffer)) == jax.tree.structure(after)
    bias = np.asarray(after["body"]["inner"]["depth"]["bias"][...])
    assert np.any(bias) and np.all(np.isfinite(bias))
    assert list(made.routed()) == [
        "inner/prelude/blocks/0/feed_forward", "inner/core/blocks/0/feed_forward", "inner/coda/blocks/0/feed_forward"
    ]  # fmt: skip
    assert not nnx.merge(*split_model(hnet(1))).routed()


# Rows of a cache


CACHED = {"both": composed(EXPERT), "mor": shapes.mor(keys_values="hybrid")}


@pytest.mark.parametrize("name", CACHED)
def test_rows_of_a_cache_are_taken_put_and_cleared(name):
    """Generation goes on for rows in another order, in another cache, and from the beginning."""
    model = CACHED[name]
    graphdef, state = split_model(model)
    tokens = random_bytes(batch=3, seq=12) % model.vocab_size
    made = nnx.merge(graphdef, state)

    @jax.jit
    def append(state, tokens, cache):
        out, cache = nnx.merge(graphdef, state).prefill(tokens, cache)
        return out.logits, cache

    _, cache = append(state, tokens[:, :6], made.init_cache(3, 20))
    want, _ = append(state, tokens[:, 6:], cache)
    order = jnp.array([2, 0, 1])
    got, _ = append(state, tokens[np.array(order), 6:], take(cache, order))
    np.testing.assert_allclose(got, want[order], atol=1e-4)

    _, other = append(state, tokens[::-1, :6], made.init_cache(3, 20))
    mixed = put(other, jnp.array([1]), take(cache, jnp.array([0])))
    rows = np.stack([tokens[2, 6:], tokens[0, 6:], tokens[0, 6:]])
    got, _ = append(state, rows, mixed)
    np.testing.assert_allclose(got, want[np.array([2, 0, 0])], atol=1e-4)

    fresh = clear(cache, jnp.array([0, 2]), made.init_cache(1, 20))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 1], b[:, 1]), fresh, cache)
    got, _ = append(state, np.stack([tokens[1, :6], tokens[1, 6:], tokens[0, :6]]), fresh)
    first, _ = append(state, tokens[[1, 1, 0], :6], made.init_cache(3, 20))
    np.testing.assert_allclose(got, np.stack([first[0], want[1], first[2]]), atol=1e-4)
