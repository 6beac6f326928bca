"""Local code on a mesh: what `sharded` gives it, and what gradients come back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.errors import MeshError
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.parallel.rules import AxisRules, placement
from adaptive.parallel.shard import sharded, sum_of_parts

pytestmark = pytest.mark.compiles

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 4, 3)).astype(np.float32)
WEIGHTS = {"scale": RNG.normal(size=3).astype(np.float32), "shift": RNG.normal(size=(1, 3)).astype(np.float32)}


def local(x, weights):
    return jnp.tanh(x * weights["scale"]) + weights["shift"], {"sum": x.sum((1, 2))}


def mapped():
    return sharded(local, [("batch",), ()], (("batch", None), {"sum": ("batch",)}))


def test_without_a_mesh_it_is_the_function_itself():
    assert mapped() is local
    with placement(make_mesh(MeshConfig(), jax.devices()[:1]), AxisRules()):
        assert mapped() is local


def test_each_device_has_its_part():
    shapes = []

    def seen(x, weights):
        shapes.append((x.shape, weights["shift"].shape))
        return x

    with placement(make_mesh(MeshConfig(data=2, expert=2, tensor=2)), AxisRules()):
        names = {"scale": (None,), "shift": (None, None)}
        out = jax.jit(lambda x, w: sharded(seen, [("batch",), names], ("batch",))(x, w))(X, WEIGHTS)
    assert set(shapes) == {((2, 4, 3), (1, 3))}
    np.testing.assert_array_equal(out, X)


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=8), MeshConfig(data=2, tensor=4), MeshConfig(data=1, fsdp=2, expert=4)]
)
def test_values_and_gradients_equal_one_device(sizes):
    """Gradients of arguments that are whole are summed over the parts of the batch, and counted once along `tensor`."""

    def loss(fn, x, weights):
        y, sums = fn(x, weights)
        return (y**2).sum() + (sums["sum"] ** 2).sum()

    want = jax.grad(lambda *args: loss(local, *args), argnums=(0, 1))(X, WEIGHTS)
    with placement(make_mesh(sizes), AxisRules()):
        got = jax.jit(jax.grad(lambda *args: loss(mapped(), *args), argnums=(0, 1)))(X, WEIGHTS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_between_slices_there_are_shares_of_a_sum_alone():
    """Of a head's gradient: it is scattered within each slice, and its shares are summed between them."""
    with placement(make_mesh(MeshConfig(data=2, fsdp=4, slices=2)), AxisRules()):
        parts = np.ones((8, 64, 32), np.float32)
        text = jax.jit(lambda parts: sum_of_parts(parts, jnp.float32)).lower(parts).compile().as_text()
    found = dict(re.findall(r" (reduce-scatter|all-reduce)\(.*replica_groups=(.*?), [a-z]", text))
    assert found == {"reduce-scatter": "{{0,1,2,3},{4,5,6,7}}", "all-reduce": "{{0,4},{1,5},{2,6},{3,7}}"}


def test_sizes_that_the_mesh_does_not_divide():
    with placement(make_mesh(MeshConfig(data=4, expert=2)), AxisRules()), pytest.raises(MeshError) as error:
        mapped()(X[:6], WEIGHTS)
    for part in ("6 along 'batch'", "data*fsdp*expert=8", "a multiple of 8"):
        assert part in str(error.value)
