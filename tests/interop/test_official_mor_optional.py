"""Tensors that a released Mixture-of-Recursions checkpoint may leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import mor as oracle

from adaptive.errors import UserError
from adaptive.interop import from_official

pytestmark = pytest.mark.compiles

TOKENS = np.random.default_rng(7).integers(0, 64, (2, 12), dtype=np.int32)


def test_a_missing_loss_free_bias_is_zero():
    config = oracle.configs()["token-free"]
    tensors = oracle.random_tensors(config, 0)
    without = {key: value for key, value in tensors.items() if key != "model.layers.1.router_bias"}
    assert len(without) == len(tensors) - 1
    np.testing.assert_array_equal(from_official("mor", without, config).body.depth.bias[...], jnp.zeros(3))


def test_a_random_router_needs_no_tensors_and_repeats_itself():
    config = oracle.official(8, mor={"rand_router": True}, expert={"sampling": None})
    tensors = oracle.random_tensors(config, 0)
    assert not any("_router" in name for name in tensors)
    forward = jax.jit(lambda t: from_official("mor", t, config)(TOKENS))
    first, again = forward(tensors), forward(tensors)
    np.testing.assert_array_equal(first.logits, again.logits)
    assert [s.indices.shape[1] for s in first.trace.selections] == oracle.capacities(config, TOKENS.shape[1])


def test_a_learned_router_is_not_optional():
    config = oracle.configs()["expert"]
    tensors = oracle.random_tensors(config, 0)
    del tensors["model.layers.2.mor_router.router.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.2\.mor_router\.router\.weight \[1, 32\] is missing"):
        from_official("mor", tensors, config)
