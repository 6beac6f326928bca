"""Learning rates of parts, and what weight decay reaches."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import shapes
from flax import nnx
from hnet_models import split_model

from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import acm, blockffn, moe_pp, token_choice
from adaptive.models.depth import expert_choice
from adaptive.optim.build import make_optimizer
from adaptive.optim.config import ScheduleConfig
from adaptive.optim.groups import decayed, groups, rates
from adaptive.optim.optimizers import adamw

pytestmark = pytest.mark.compiles

RATES = (3.0, 1.7, 0.9)
HNET = shapes.hnet(("m1", ("T1m1", ("T1",), "t1"), "m1"), widths=(8, 8, 16), rates=RATES)


def parameters(model):
    """The model's parameters, shapes alone."""
    return nnx.state(nnx.eval_shape(lambda: model.build(jax.random.key(0))), nnx.Param)


@pytest.fixture(scope="module")
def params():
    return nnx.state(nnx.merge(*split_model(HNET)), nnx.Param)


def paths(mask, value) -> set[str]:
    """Paths below the body, without the places in lists, of the leaves that have this value."""
    flat = nnx.to_flat_state(mask)
    return {
        ".".join(str(name) for name in path if not isinstance(name, int) and name != "body")
        for path, own in flat
        if own.get_raw_value() == value
    }


MAMBA = ("conv_x_bias", "conv_bc_bias", "norm")


def test_nothing_one_dimensional_is_decayed(params):
    outer, inner = [[f"{inside}{part}" for part in ("encoder", "decoder")] for inside in ("", "inner.")]
    mambas = [f"{part}.blocks.mixer" for part in (*outer, inner[0])]
    assert paths(decayed(params), False) == {
        "inner.pad", "residual.bias", "inner.residual.bias", "inner.inner.stack.norm.weight",
        *(f"{part}.norm.weight" for part in (*outer, *inner)),
        *(f"{part}.blocks.mixer_norm.weight" for part in (*outer, *inner, "inner.inner.stack")),
        *(f"{part}.blocks.feed_forward_norm.weight" for part in (inner[0], "inner.inner.stack")),
        *(f"{block}.{name}" for block in mambas for name in (*MAMBA, "dt_bias", "a_log", "d")),
    }  # fmt: skip


def test_the_release_leaves_three_kinds_out_of_decay(params):
    assert paths(decayed(params, "official"), False) == {
        "residual.bias", "inner.residual.bias",
        *(f"{part}.blocks.mixer.{name}" for part in ("encoder", "decoder", "inner.encoder") for name in MAMBA),
    }  # fmt: skip


def routed(router, **options):
    return experts.Settings(router=router, experts=4, expert_size=8, **options)


@pytest.mark.parametrize(
    ("model", "beside"),
    [
        (shapes.mor(bias="all", qk_norm="head"), ()),
        (shapes.plain(feed_forward=routed(moe_pp.Settings())), (".constant",)),
        (shapes.plain(feed_forward=routed(blockffn.Settings(), gated=False)), ("gain",)),
        (shapes.plain(feed_forward=routed(token_choice.Settings(score="cosine"))), ("temperature",)),
        (shapes.plain(feed_forward=routed(acm.Settings())), ("base",)),
    ],
)
def test_norms_biases_and_gains_are_not_decayed(model, beside):
    mask = decayed(parameters(model))
    for path in paths(mask, True) | paths(mask, False):
        kept = "norm" in path or "bias" in path or any(path.endswith(name) for name in beside)
        assert (path in paths(mask, False)) == kept, path


def test_auxiliary_routers_are_a_group_of_their_own():
    model = shapes.mor(depth=expert_choice.Settings(sampling="aux_router"))
    assert paths(groups(parameters(model)), "auxiliary") == {"depth.aux_routers.out"}
    assert not paths(groups(parameters(shapes.mor())), "auxiliary")


def test_each_part_has_the_rate_of_its_stage(params):
    found = rates(params)
    own = {rate: paths(found, rate) for rate in RATES}
    assert sum(map(len, own.values())) == len(paths(found, 3.0) | paths(found, 1.7) | paths(found, 0.9))
    assert {"embedding", "head", "chunker.q", "residual.weight", "decoder.norm.weight"} <= own[3.0]
    assert {"inner.chunker.q", "inner.residual.weight", "inner.encoder.norm.weight"} <= own[1.7]
    assert {"inner.pad", "inner.inner.stack.norm.weight"} <= own[0.9]
    assert {path for path in own[0.9] if not path.startswith("inner.inner.")} == {"inner.pad"}


def test_a_part_moves_as_if_the_learning_rate_were_its_own(params):
    gradients = jax.tree.map(lambda x: 0.3 + 0.1 * x, params)
    config = adamw.Settings(learning_rate=0.1, weight_decay=0.5)

    def moved(config, params):
        tx = make_optimizer(config, ScheduleConfig(kind="constant"), 10)
        steps = jax.tree.unflatten(jax.tree.structure(params), gradients)

        @jax.jit
        def twice(params):
            def once(after, _):
                updates, state = tx.update(steps, after[1], after[0])
                return (optax.apply_updates(after[0], updates), state), None

            return jax.lax.scan(once, (params, tx.init(params)), None, 2)[0][0]

        return jax.tree.leaves(twice(params))

    of = jax.tree.leaves(rates(params))
    level = jax.tree.map(_of_rate_one, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    gradients = jax.tree.leaves(gradients)
    staged = moved(config, params)
    for each in RATES:
        alone = moved(dataclasses.replace(config, learning_rate=0.1 * each), level)
        for a, b, own in zip(staged, alone, of, strict=True):
            assert np.allclose(a, b, atol=1e-6) == (own == each)


def _of_rate_one(param):
    new = param.replace(param[...])
    new.set_metadata(rate=1.0)
    return new
