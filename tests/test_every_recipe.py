"""Every recipe takes a training step at reduced size: widths and depths shrink, kinds and strategies stay."""

import dataclasses

import jax
import numpy as np
import pytest

from adaptive.data.windows import Batch
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, list_recipes, load
from adaptive.training.program import Program

ROWS, SEQ = 2, 24


def reduced(recipe: Recipe) -> Recipe:
    layers = recipe.model.recursions + 2 * recipe.model.unique_ends
    return dataclasses.replace(recipe, name="").with_(
        "model.hidden_size=16", "model.intermediate_size=16", "model.num_heads=2", "model.num_kv_heads=1",
        "model.head_dim=8", "model.vocab_size=64", f"model.num_layers={layers}", f"data.seq_len={SEQ}",
        f"train.batch_size={ROWS}", "train.device_batch_size=1", "train.steps=4", "schedule.warmup_steps=0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def stepped():
    """Steps a recipe once; recipes that are alike when reduced share the result."""
    results = {}

    def step(recipe: Recipe):
        settings = (recipe.model, recipe.optimizer, recipe.schedule, recipe.data.cross_document)
        if settings not in results:
            mesh = make_mesh(MeshConfig(), jax.devices()[:1])
            program = Program(recipe, mesh)
            tokens = np.random.default_rng(0).integers(0, 64, (ROWS, SEQ + 1)).astype(np.int32)
            ones = np.ones((ROWS, SEQ), np.int32)
            batch = Batch(
                tokens[:, :-1], tokens[:, 1:], np.arange(SEQ, dtype=np.int32) * ones, ones, ones.astype(np.float32)
            )
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
