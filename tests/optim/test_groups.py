"""Learning rates of stages, what weight decay reaches, and schedules."""

import dataclasses

import jax
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

HNET = ('model.hnet.layout=["m1", ["T1m1", ["T1"], "t1"], "m1"]', "model.hnet.widths=8,8,16", "model.hnet.heads=2",
        "model.hnet.intermediates=16", "model.hnet.d_state=4", "model.hnet.ssm_head_dim=4")  # fmt: skip
RATES = (3.0, 1.7, 0.9)


@pytest.fixture(scope="module")
def params() -> nnx.State:
    """The parameters of an H-Net of two chunking stages."""
    config = Recipe(name="").with_(*HNET, "model.tie_embeddings=false").model
    return nnx.state(build_model(config, key=jax.random.key(0)), nnx.Param)


def left_out(mask) -> set[str]:
    """Paths of the leaves that are not true, without the places in lists."""
    flat = jax.tree_util.tree_leaves_with_path(mask)
    return {".".join(name for name in names(path) if not name.isdigit()) for path, value in flat if not value}


MAMBA = ("conv_x_bias", "conv_bc_bias", "norm")


def test_nothing_one_dimensional_is_decayed(params):
    blocks = ("stages.encoder.runs", "stages.decoder.runs", "main.runs")
    assert left_out(decayed(params)) == {
        "main_pad", "stages.residual.bias", "stages.encoder.norm.weight", "stages.decoder.norm.weight",
        "main.norm.weight", "stages.encoder.runs.feed_forward_norm.weight", "main.runs.feed_forward_norm.weight",
        *(f"{block}.norm.weight" for block in blocks),
        *(f"{block}.mixer.{name}" for block in blocks[:2] for name in (*MAMBA, "dt_bias", "a_log", "d")),
    }  # fmt: skip


def test_the_release_leaves_three_kinds_out_of_decay(params):
    assert left_out(decayed(params, "official")) == {
        "stages.residual.bias",
        *(f"stages.{part}.runs.mixer.{name}" for part in ("encoder", "decoder") for name in MAMBA),
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
def test_a_stage_moves_as_if_the_learning_rate_were_its_own(params, weight_decay):
    gradients = jax.tree.map(lambda x: 0.3 + 0.1 * x, params)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=weight_decay, stage_rates=RATES)

    def moved(config):
        tx = make_optimizer(config, ScheduleConfig(kind="constant"), 10)
        after, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradients, state, after)
            after = optax.apply_updates(after, updates)
        return jax.tree.leaves(after)

    rate = rates(params, config)
    of = jax.tree.leaves(rate)
    assert set(of) == set(RATES)
    assert (rate["embedding"].get_raw_value(), rate["main_pad"].get_raw_value()) == (3.0, 0.9)
    staged = moved(config)
    for each in RATES:
        alone = moved(dataclasses.replace(config, learning_rate=0.1 * each, stage_rates=()))
        for a, b, own in zip(staged, alone, of, strict=True):
            assert np.allclose(a, b, atol=1e-6) == (own == each)


def test_square_root_decay_is_steep_at_first():
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.2, decay_shape="sqrt", floor=0.1)
    rate = make_schedule(config, 2.0, 100)
    expected = [2.0 * (1 - 0.9 * np.sqrt(progress)) for progress in (0, 0.05, 0.25, 1, 1)]
    np.testing.assert_allclose([rate(t) for t in (80, 81, 85, 100, 110)], expected, rtol=1e-6)
    np.testing.assert_allclose([rate(t) for t in (0, 5, 10, 79)], [0, 1, 2, 2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.stage_rates=1,2",), "stage_rates=1.0,2.0 is for H-Nets"),
        (("optimizer.decay=official",), "decay=official is for H-Nets"),
        ((*HNET, "optimizer.stage_rates=1,2"), "2 numbers for the 3 stages"),
        ((*HNET, "optimizer.stage_rates=1,1,0"), "must be above 0"),
    ],
)
def test_rates_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(name="").with_(*overrides).validate()


def test_rates_that_fit_are_accepted():
    Recipe(name="").with_(*HNET, "optimizer.stage_rates=2,1.5,1", "optimizer.decay=official").validate()
