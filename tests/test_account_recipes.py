"""The account of every recipe's model: its parameters at full size, and each family's compiled step at a small one."""

import jax
import pytest
from flax import nnx
from shapes import reduced
from test_account import program, traced_flops

from adaptive.account import account, parameters
from adaptive.recipe import list_recipes, load

# One recipe of each kind whose matmuls are known before it runs; what routers of experts take is an expectation.
FAMILIES = ("recursive_tiny", "mor_360m_token", "mor_moe_tiny", "moe_ec_tiny", "hnet_mor_tiny", "mambabyte_tiny")


@pytest.mark.parametrize("name", list_recipes())
def test_parameters_are_those_of_the_model(name):
    model = load(name).model
    built = nnx.eval_shape(lambda: model.build(jax.random.key(0)))
    sizes = parameters(model)
    assert sizes.total == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert sizes.effective >= sizes.unique


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_has_the_matmuls_of_the_account(name):
    model, seq = reduced(load(name).model), 24
    assert traced_flops(*program(model, seq=seq)) == account(model, seq).train_flops()
