"""Every recipe takes a training step at reduced size: widths and depths shrink, kinds and strategies stay."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from adaptive.data.batch import Batch
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, list_recipes, load
from adaptive.training.program import Program

pytestmark = pytest.mark.compiles

ROWS, SEQ = 2, 24


def house(recipe: Recipe) -> bool:
    """Whether the model stands inside an H-Net."""
    return '"model"' in recipe.model.hnet.layout


def reduced(recipe: Recipe) -> Recipe:
    layers = recipe.model.recursions + 2 * recipe.model.unique_ends
    width = 16 + 8 * (len(set(recipe.model.hnet.widths)) - 1) if house(recipe) else 16
    return dataclasses.replace(recipe, name="").with_(
        f"model.hidden_size={width}", "model.intermediate_size=16", "model.num_heads=2", "model.num_kv_heads=1",
        "model.head_dim=8", "model.vocab_size=64", f"model.num_layers={layers}", f"data.seq_len={SEQ}",
        f"train.batch_size={ROWS}", "train.device_batch_size=1", "train.steps=4", "schedule.warmup_steps=0",
        *(reduced_hnet(recipe) if recipe.model.hnet.layout else ()),
    )  # fmt: skip


def reduced_hnet(recipe: Recipe) -> list[str]:
    """Every kind of block once, widths that widen where the recipe's do, its chunkers and its way of merging. Rates and
    capacities are the same for all, so that sizes of one kind share a program."""
    hnet = recipe.model.hnet
    width = {w: str(16 + 8 * i) for i, w in enumerate(sorted(set(hnet.widths)))}
    rates = ("", "2,1", "2,1.5,1")[hnet.stages]
    return [
        f"model.hnet.layout={re.sub('[0-9]+', '1', hnet.layout)}",
        f"model.hnet.widths={','.join(width[w] for w in hnet.widths)}",
        f"model.hnet.intermediates={','.join(str(min(f, 16)) for f in hnet.intermediates)}",
        f"model.hnet.windows={','.join(str(min(w, 7)) for w in hnet.windows)}",
        f"model.hnet.capacities={','.join(['0.5'] * hnet.stages)}",
        *("model.hnet.heads=2", "model.hnet.rotary_dims=4", "model.hnet.d_state=4", "model.hnet.ssm_head_dim=8"),
        *("model.hnet.ssm_block=8", "model.hnet.capacity_steps=", "model.hnet.ratio_targets=3"),
        *("model.hnet.ratio_over=global", f"optimizer.stage_rates={rates}", "optimizer.learning_rate=1e-3"),
        "train.remat=none",
    ]


@pytest.fixture(scope="module")
def stepped():
    """Steps a recipe once; recipes that are alike when reduced share the result."""
    results = {}

    def step(recipe: Recipe):
        settings = (recipe.model, recipe.optimizer, recipe.schedule, recipe.data.cross_document, recipe.data.boundaries)
        if settings not in results:
            mesh = make_mesh(MeshConfig(), jax.devices()[:1])
            program = Program(recipe, mesh)
            tokens = np.random.default_rng(0).integers(0, 64, (ROWS, SEQ + 1)).astype(np.int32)
            ones = np.ones((ROWS, SEQ), np.int32)
            batch = Batch(
                tokens[:, :-1], tokens[:, 1:], np.arange(SEQ, dtype=np.int32) * ones, ones, ones.astype(np.float32),
                tokens[:, :-1] % 4 == 0 if recipe.data.boundaries == "words" else None,
            )  # fmt: skip
            state = program.fresh_state()
            before = [np.asarray(a) for a in jax.tree.leaves(state.params)]
            after, metrics = program.compile_train_step().call(state, program.to_devices(batch))
            moved = [
                np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves(after.params), before, strict=True)
            ]
            results[settings] = float(metrics["ce"]), int(metrics["skipped"]), moved
        return results[settings]

    return step


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_takes_a_step(stepped, name):
    ce, skipped, moved = stepped(reduced(load(name)))
    assert abs(ce - np.log(64)) < 0.2  # a fresh model is as good as a guess
    assert skipped == 0
    assert all(change > 0 for change in moved)  # every parameter is reached by a gradient
