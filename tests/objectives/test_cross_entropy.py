"""Cross entropy in chunks against optax on whole logits."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from adaptive.objectives.cross_entropy import chunk_length, cross_entropy_sum
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, placement

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def example():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 12, 8))
    weight = jax.random.normal(keys[1], (20, 8))
    targets = jax.random.randint(keys[2], (3, 12), 0, 20)
    mask = jax.random.bernoulli(keys[3], 0.7, (3, 12)).astype(jnp.float32)
    return hidden, weight, targets, mask


def expected(hidden, weight, targets, mask, cap=0.0):
    logits = hidden @ weight.T
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (nll * mask).sum(), nll


@pytest.mark.parametrize(("chunk", "cap"), [(1, 0.0), (4, 0.0), (12, 0.0), (4, 1.5)])
def test_value_and_gradient(example, chunk, cap):
    hidden, weight, targets, mask = example

    @jax.jit
    def fused(hidden, weight):
        return jax.value_and_grad(
            lambda h, w: (lambda s, nll: (0.5 * s, nll))(*cross_entropy_sum(h, w, targets, mask, chunk, cap)),
            argnums=(0, 1), has_aux=True,
        )(hidden, weight)  # fmt: skip

    (total, nll), grads = fused(hidden, weight)
    (want, want_nll), want_grads = jax.value_and_grad(
        lambda h, w: expected(h, w, targets, mask, cap), argnums=(0, 1), has_aux=True
    )(hidden, weight)
    np.testing.assert_allclose(total, 0.5 * want, rtol=1e-5)
    np.testing.assert_allclose(nll, want_nll, atol=1e-5)
    for got, grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, 0.5 * grad, atol=1e-5)
    alone, alone_nll = cross_entropy_sum(hidden, weight, targets, mask, chunk, cap)  # without a gradient: other code
    np.testing.assert_allclose(alone, want, rtol=1e-5)
    np.testing.assert_allclose(alone_nll, want_nll, atol=1e-5)


def test_a_token_may_be_left_out(example):
    hidden, weight, targets, mask = example
    left = jnp.where(targets == 3, 4, targets)
    of = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy_sum(h, w, left, mask, 4, 1.5, 3)[0], argnums=(0, 1)))
    others = np.delete(np.arange(20), 3)
    without = lambda h, w: expected(h, w[others], jnp.where(left > 3, left - 1, left), mask, 1.5)[0]  # noqa: E731
    want, grads = jax.jit(jax.value_and_grad(without, argnums=(0, 1)))(hidden, weight)
    got, made = of(hidden, weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for one, grad in zip(made, grads, strict=True):
        np.testing.assert_allclose(one, grad, atol=1e-5)


def test_masked_positions_get_no_gradient(example):
    hidden, weight, targets, mask = example
    grad = jax.grad(lambda h: cross_entropy_sum(h, weight, targets, mask, 4)[0])(hidden)
    assert np.array_equal(np.any(grad, axis=-1), np.asarray(mask) > 0)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("cpu", 128), ("TPU v5 lite", 1024), ("TPU v6 lite", 2048), ("NVIDIA H200", 2048), ("an unknown one", 1024)],
)
def test_chunks_divide_the_sequence_and_are_as_long_as_the_device_likes(kind, tokens):
    assert chunk_length(2048, 16, 49152, kind) == tokens // 16
    assert chunk_length(2048, 1, 320, kind) == 2048
    assert chunk_length(2048, 4, 10**6, kind) == (32 if kind == "cpu" else 256)
    assert chunk_length(7, 1000, 10**6, kind) == 1


@pytest.mark.parametrize("vocab", [24, 20])  # of each device 6 or 5 rows, which deal out over two devices or do not
def test_a_split_vocabulary_moves_numbers_of_positions_and_no_logits(vocab):
    keys = jax.random.split(jax.random.key(1), 4)
    hidden, weight = jax.random.normal(keys[0], (4, 12, 8)), jax.random.normal(keys[1], (vocab, 8))
    targets = jax.random.randint(keys[2], (4, 12), 0, vocab)
    mask = jax.random.bernoulli(keys[3], 0.7, (4, 12)).astype(jnp.float32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    axes = (("batch", "seq", None), ("vocab", "width"), ("batch", "seq"), ("batch", "seq"))
    places = [NamedSharding(mesh, AxisRules().spec(*names)) for names in axes]
    arrays = jax.device_put((hidden, weight, targets, mask), tuple(places))

    def loss(hidden, weight, targets, mask):
        return jax.value_and_grad(lambda h, w: cross_entropy_sum(h, w, targets, mask, 4)[0], (0, 1))(hidden, weight)

    with placement(mesh, AxisRules()):
        compiled = jax.jit(loss, out_shardings=(None, tuple(places[:2]))).lower(*arrays).compile()
    want, want_grads = loss(hidden, weight, targets, mask)
    total, grads = compiled(*arrays)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    for got, grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, grad, atol=1e-5)
    text = compiled.as_text()
    table, positions = vocab // 4 * 8 * 4, 2 * 4 * 4  # bytes of a device's rows, and of a number for each position
    moved = hlo.moved(text)
    assert moved["all-gather f32"] == table and hlo.collectives(text)["reduce-scatter"] == 1
    # In each chunk largest logits, sums and labels' logits, and the gradient of what is read; at the end the loss.
    assert moved["all-reduce f32"] == 3 * positions + 8 * positions + 4
