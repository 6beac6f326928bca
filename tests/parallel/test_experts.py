"""Every way to compute experts on a mesh computes what one device computes, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.parallel.config import ExpertParallel, MeshConfig
from adaptive.parallel.experts import run
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import axis_rules, placement
from adaptive.routing.dispatch import Dispatch, by_expert, by_token

BATCH, SEQ, WIDTH, HIDDEN, EXPERTS, K = 8, 4, 8, 16, 8, 2
AXES = {"up": ("experts", "width", "expert_ff"), "down": ("experts", "expert_ff", "width")}
QUICK = {"xla_backend_optimization_level": "0"}


def feed_forward(weights, rows, group_sizes):
    """Of rows [rows, D], every expert on all of them, masked: a reference."""
    if group_sizes is None:
        hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, weights["up"]))
        return jnp.einsum("ecf,efd->ecd", hidden, weights["down"])
    ends = jnp.cumsum(group_sizes)
    number = jnp.arange(len(rows))
    mine = ((number >= (ends - group_sizes)[:, None]) & (number < ends[:, None])).astype(rows.dtype)
    hidden = jax.nn.silu(jnp.einsum("rd,edf->erf", rows, weights["up"]))
    return jnp.einsum("er,erf,efd->rd", mine, hidden, weights["down"])


@functools.cache
def arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {"up": normal(EXPERTS, WIDTH, HIDDEN), "down": normal(EXPERTS, HIDDEN, WIDTH)}
    return normal(BATCH, SEQ, WIDTH), weights, normal(BATCH, SEQ, WIDTH)


def token_choice(kind: str = "random") -> tuple[Dispatch, np.ndarray]:
    """(dispatch, expert of each pair): token choice with some pairs invalid."""
    rng = np.random.default_rng(1)
    score = rng.random((BATCH, SEQ, EXPERTS))
    if kind == "empty":
        score[..., 2:] -= 10.0  # six experts have no token
    if kind == "one":
        score[..., 3] += 10.0  # one has them all
    index = np.argsort(-score, axis=-1)[..., :K].astype(np.int32)
    valid = rng.random(index.shape) > 0.1
    if kind == "one":
        valid[..., 1:] = False
    weights = rng.random(index.shape).astype(np.float32)
    return by_token(jnp.asarray(index), jnp.asarray(weights), jnp.asarray(valid), EXPERTS), np.where(valid, index, -1)


def expert_choice() -> Dispatch:
    rng = np.random.default_rng(2)
    capacity = 3  # not a multiple of two
    index = np.argsort(rng.random((BATCH, EXPERTS, SEQ)), axis=-1)[..., :capacity].astype(np.int32)
    weights = rng.random(index.shape).astype(np.float32)
    return by_expert(jnp.asarray(index), jnp.asarray(weights), jnp.asarray(rng.random(index.shape) > 0.2), SEQ)


DISPATCHES = {
    "random": lambda: token_choice()[0],
    "empty": lambda: token_choice("empty")[0],
    "one": lambda: token_choice("one")[0],
    "expert_choice": expert_choice,
}


def loss(x, scale, weights, dispatch, direction, ragged):
    dispatch = jax.tree_util.tree_map(lambda a: a, dispatch)
    y, lost = run(x, _with_weights(dispatch, scale), weights, AXES, feed_forward, ragged=ragged)
    return (y * direction).sum(), (y, lost)


def _with_weights(dispatch: Dispatch, scale: jax.Array) -> Dispatch:
    import dataclasses

    return dataclasses.replace(dispatch, weights=jnp.where(dispatch.valid, scale, 0.0))


def computed(dispatch, ragged, mesh=None, settings=None):
    """(y, lost, gradients of x, of the combine weights and of the matrices)."""
    x, weights, direction = arrays()
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="ragged")
    args = (x, dispatch.weights, weights, dispatch, direction)
    if mesh is None:
        grads, (y, lost) = step.lower(*args, ragged=ragged).compile(QUICK)(*args)
    else:
        devices = jax.devices()[: int(np.prod(mesh))]
        with placement(make_mesh(MeshConfig(*mesh), devices), axis_rules(settings), settings):
            grads, (y, lost) = step.lower(*args, ragged=ragged).compile(QUICK)(*args)
    return jax.tree.map(np.asarray, (y, lost, *grads))


@functools.cache
def on_one_device(name: str, ragged: bool):
    return computed(DISPATCHES[name](), ragged)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


MESHES = [(1, 1, 2, 1), (2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 2, 2)]


@pytest.mark.parametrize("name", DISPATCHES)
def test_slots_and_rows_agree_with_the_dense_reference(name):
    dispatch = DISPATCHES[name]()
    x, weights, _ = arrays()
    tokens = x.reshape(-1, WIDTH)
    every = jax.nn.silu(jnp.einsum("td,edf->etf", tokens, weights["up"]))
    every = jnp.einsum("etf,efd->etd", every, weights["down"])
    want = jnp.einsum("te,etd->td", dispatch.combine_matrix(), every).reshape(x.shape)
    assert_same(on_one_device(name, True)[0], want)
    assert_same(on_one_device(name, False), on_one_device(name, True))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["slots", "rows"])
@pytest.mark.parametrize("strategy", ["expert", "gather", "data", "tensor"])
def test_every_strategy_equals_one_device(strategy, ragged, mesh):
    got = computed(DISPATCHES["random"](), ragged, mesh, ExpertParallel(strategy))
    assert_same(got, on_one_device("random", ragged))
