"""Learning rates of stages, what weight decay reaches, and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.models.build import build_model
from adaptive.optim.build import make_optimizer
from adaptive.optim.config import OptimizerConfig, ScheduleConfig
from adaptive.optim.groups import decayed, names, rates, stage_of
from adaptive.optim.schedule import make_schedule
from adaptive.recipe import Recipe, load

ONES = jnp.ones((2, 3))


def mamba(**more):
    names = ("z", "x", "bc", "dt", "conv_x", "conv_bc", "conv_x_bias", "conv_bc_bias", "dt_bias", "a_log", "d", "out")
    return dict.fromkeys(names, ONES) | {"norm": ONES} | more


def block(mixer):
    return {"norm1": {"weight": ONES}, "mixer": mixer, "norm2": {"weight": ONES}, "mlp": {"gate": ONES, "down": ONES}}


# The parameters of an H-Net of two chunking stages, by name.
PARAMS = {
    "embedding": ONES,
    "head": ONES,
    "stages": [
        {
            "pad": ONES,
            "encoder": {"runs": [block(mamba())], "norm": {"weight": ONES}},
            "decoder": {"runs": [block({"q": ONES, "o": ONES})], "norm": {"weight": ONES}},
            "chunker": {"q": ONES, "k": ONES},
            "residual": {"weight": ONES, "bias": ONES},
        }
        for _ in range(2)
    ],
    "main": {"runs": [block({"q": ONES, "o": ONES})], "norm": {"weight": ONES}},
    "main_pad": ONES,
}


def left_out(mask) -> set[str]:
    """Paths of the leaves that are not true, without the places in lists."""
    flat = jax.tree_util.tree_leaves_with_path(mask)
    return {".".join(name for name in names(path) if not name.isdigit()) for path, value in flat if not value}


def test_nothing_one_dimensional_is_decayed():
    assert left_out(decayed(PARAMS)) == {
        "stages.pad", "stages.residual.bias", "main_pad",
        "stages.encoder.norm.weight", "stages.decoder.norm.weight", "main.norm.weight",
        *(f"stages.{part}.runs.{norm}.weight" for part in ("encoder", "decoder") for norm in ("norm1", "norm2")),
        "main.runs.norm1.weight", "main.runs.norm2.weight",
        *(f"stages.encoder.runs.mixer.{name}" for name in (
            "conv_x_bias", "conv_bc_bias", "dt_bias", "a_log", "d", "norm"
        )),
    }  # fmt: skip


def test_the_release_leaves_three_kinds_out_of_decay():
    assert left_out(decayed(PARAMS, "official")) == {
        "stages.residual.bias",
        *(f"stages.encoder.runs.mixer.{name}" for name in ("conv_x_bias", "conv_bc_bias", "norm")),
    }


@pytest.mark.parametrize("name", ["mor_tiny", "moe_pp_tiny", "moe_longcat_tiny"])
def test_without_stages_norms_and_biases_alone_are_not_decayed(name):
    recipe = load(name).with_("model.attention_bias=true", "model.qk_norm=head")
    model = nnx.eval_shape(lambda: build_model(recipe.model, key=jax.random.key(0)))
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(nnx.state(model, nnx.Param))):
        text = jax.tree_util.keystr(path)
        assert decays == ("norm" not in text and "bias" not in text), text


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        (("embedding",), 0), (("head",), 0), (("stages", "0", "encoder", "runs", "1", "mixer", "x"), 0),
        (("stages", "1", "pad"), 1), (("main", "block", "attention", "q"), 2), (("main_pad",), 2),
    ],
)  # fmt: skip
def test_stage_of_a_parameter(path, stage):
    assert stage_of(path, innermost=2) == stage


def test_paths_of_modules_are_attributes_and_places():
    model = nnx.eval_shape(lambda: build_model(load("mor_tiny").model, key=jax.random.key(0)))
    found = {names(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))}
    assert {("embedding",), ("routers", "2", "out"), ("block", "attention_norm", "weight")} <= found


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_stage_moves_as_if_the_learning_rate_were_its_own(weight_decay):
    gradients = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=weight_decay, stage_rates=(3.0, 1.7, 0.9))

    def moved(config):
        tx = make_optimizer(config, ScheduleConfig(kind="constant"), 10)
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    staged, rate = moved(config), rates(PARAMS, config)
    for each in (3.0, 1.7, 0.9):
        alone = moved(dataclasses.replace(config, learning_rate=0.1 * each, stage_rates=()))
        same = jax.tree.map(lambda a, b, r, each=each: r != each or np.allclose(a, b, atol=1e-6), staged, alone, rate)
        assert all(jax.tree.leaves(same))
    assert set(jax.tree.leaves(rate)) == {3.0, 1.7, 0.9}
    assert (rate["embedding"], rate["stages"][1]["pad"], rate["main_pad"]) == (3.0, 1.7, 0.9)


def test_square_root_decay_is_steep_at_first():
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.2, decay_shape="sqrt", floor=0.1)
    rate = make_schedule(config, 2.0, 100)
    expected = [2.0 * (1 - 0.9 * np.sqrt(progress)) for progress in (0, 0.05, 0.25, 1, 1)]
    np.testing.assert_allclose([rate(t) for t in (80, 81, 85, 100, 110)], expected, rtol=1e-6)
    np.testing.assert_allclose([rate(t) for t in (0, 5, 10, 79)], [0, 1, 2, 2])


HNET = ('model.hnet.layout=["m2", ["T2"], "m2"]', "model.hnet.widths=64", "model.hnet.heads=2",
        "model.hnet.intermediates=128")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.stage_rates=1,2",), "stage_rates=1.0,2.0 is for H-Nets"),
        (("optimizer.decay=official",), "decay=official is for H-Nets"),
        ((*HNET, "optimizer.stage_rates=1,2,3"), "3 numbers for the 2 stages"),
        ((*HNET, "optimizer.stage_rates=1,0"), "must be above 0"),
    ],
)
def test_rates_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(name="").with_(*overrides).validate()


def test_rates_that_fit_are_accepted():
    Recipe(name="").with_(*HNET, "optimizer.stage_rates=2,1", "optimizer.decay=official").validate()
