"""Scores of a router compiled for an NVIDIA GPU, where rows are as long as no tile."""

import sys

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptive.layers.linear import scored
from kernels_pallas.choice import target

pytestmark = pytest.mark.compiles

ROWS, LENGTH, WIDTH, CHOICES = 4, 682, 960, 8  # what the last recursion of three keeps of 2,048 positions


def test_gradients_of_what_each_choice_takes_compile():
    assert aot.run(__file__, "h200").splitlines()[-1] == "compiled"


@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGHEST])
def test_the_form_for_gpus_is_the_same_product(precision):
    rng = np.random.default_rng(0)
    x, w, d = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 7, 5), (5, 2), (3, 7, 2)))

    def pulled(platform):
        with target(platform):
            y, pull = jax.vjp(lambda x, w: scored(x, w, precision), x, w)
        return y, *pull(d)

    for got, want in zip(pulled("gpu"), pulled("cpu"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def main(name):
    mesh = Mesh(np.array(aot.devices(name)[:1]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())

    def taken(x, w):
        logits = scored(x.astype(jnp.float32), w)
        best, _ = jax.lax.top_k(jax.nn.softmax(logits).swapaxes(1, 2), LENGTH // 4)
        return best.sum() + jax.nn.logsumexp(logits, axis=-1).sum()

    structs = [
        jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((WIDTH, CHOICES), jnp.float32, sharding=whole),
    ]
    with jax.set_mesh(mesh), target("gpu"):
        jax.jit(jax.grad(taken, argnums=(0, 1))).lower(*structs).compile()
    print("compiled")


if __name__ == "__main__":
    main(sys.argv[1])
