"""Every recipe trains at reduced size: widths, depths and numbers shrink, kinds and strategies stay."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import shapes

from adaptive.data.batch import Batch
from adaptive.data.config import DataConfig
from adaptive.layers.chunkers import stride
from adaptive.layers.feed_forwards import experts
from adaptive.layers.mixers import attention
from adaptive.models.bodies import hnet, plain, recursive
from adaptive.objectives import Objective, masked_diffusion
from adaptive.optim.config import ScheduleConfig
from adaptive.optim.optimizers import adamw
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import Recipe, list_recipes, load
from adaptive.training.config import TrainConfig
from adaptive.training.program import Program
from adaptive.training.step import make_train_step

pytestmark = pytest.mark.compiles

ROWS, SEQ, VOCAB, STEPS = 2, 24, 64, 6


def small(recipe: Recipe) -> Recipe:
    """The recipe at the size of a test. Numbers that change no program are the same for all, so that sizes of a family
    share one."""
    model = dataclasses.replace(recipe.model, body=alike(recipe.model.body))
    # Released MoR recipes have both ways; those without a router would be the tiny ones' programs once more.
    crossing = recipe.data.cross_document and model.facts().depth != "none"
    if recipe.objective.noisy:  # sizes of one network, of which some have heads of their own, as other recipes do
        model = dataclasses.replace(model, tie_embeddings=True, norm_eps=1e-5)
    own = {"vocab_size": VOCAB, "init_std": 0.02, "embedding_std": 0.02 if model.tie_embeddings else 1.0}
    return Recipe(
        name="",
        model=shapes.reduced(model, layers=1, **own),
        objective=read(recipe.objective),
        data=DataConfig(seq_len=SEQ, cross_document=crossing, boundaries=recipe.data.boundaries),
        # What a step hides another one may show: of random tokens their numbers alone can be learnt.
        optimizer=adamw.Settings(learning_rate=1e-2 if recipe.objective.noisy else 1e-3, decay=recipe.optimizer.decay),
        schedule=ScheduleConfig("constant"),
        train=TrainConfig(steps=4, batch_size=ROWS),
    )


def read(aim: Objective) -> Objective:
    """The objective for tokens of a test, of which the last stands for hidden ones."""
    if not isinstance(aim, masked_diffusion.Settings):
        return aim
    return dataclasses.replace(aim, mask_id=VOCAB - 1, stable=False)


def alike(body: Any) -> Any:
    if isinstance(body, recursive.Settings):
        return shapes.of_two_passes(body)
    if isinstance(body, plain.Settings):
        blocks = tuple(
            dataclasses.replace(one, feed_forward=fewer(one.feed_forward), mixer=turned(one.mixer))
            for one in body.stack.blocks
        )
        return dataclasses.replace(body, stack=dataclasses.replace(body.stack, blocks=blocks))
    if isinstance(body, hnet.Settings):
        chunker = body.chunker
        if chunker.learned:
            chunker = dataclasses.replace(chunker, target=3.0, ratio_over="global")
        if isinstance(chunker, stride.Settings):
            chunker = stride.Settings(length=3)
        return dataclasses.replace(
            body,
            chunker=chunker,
            inner=alike(body.inner),
            rate=2.0,
            inner_rate=1.0,
            capacities=(0.5,),
            capacity_steps=(),
        )
    return body


def fewer(feed_forward: Any) -> Any:
    """A mixture of many experts as one of eight, of which a token has two, or by a schedule one to three."""
    if not isinstance(feed_forward, experts.Settings) or feed_forward.experts <= 8:
        return feed_forward
    router = dataclasses.replace(feed_forward.router, experts_per_token=2)
    if getattr(router, "k_max", 0):
        router = dataclasses.replace(router, k_min=1, k_max=3)
    return dataclasses.replace(feed_forward, experts=8, router=router)


def turned(mixer: Any) -> Any:
    return dataclasses.replace(mixer, rope_theta=1e4) if isinstance(mixer, attention.Settings) else mixer


def batch_of(recipe: Recipe) -> Batch:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, SEQ + 1)).astype(np.int32)
    ones = np.ones((ROWS, SEQ), np.int32)
    boundaries = tokens[:, :-1] % 4 == 0 if recipe.data.boundaries == "words" else None
    places = np.arange(SEQ, dtype=np.int32) * ones
    return Batch(tokens[:, :-1], tokens[:, 1:], places, ones, ones.astype(np.float32), boundaries)


@pytest.fixture(scope="module")
def stepped():
    """Steps a recipe on one batch; recipes that are alike when reduced share the result."""
    results: dict[Any, Any] = {}

    def step(recipe: Recipe):
        settings = (
            recipe.model,
            recipe.objective,
            recipe.optimizer,
            recipe.data.cross_document,
            recipe.data.boundaries,
        )
        if settings not in results:
            program = Program(recipe, make_mesh(MeshConfig(), jax.devices()[:1]))
            with program.placed():
                run = jax.jit(
                    make_train_step(
                        program.graphdef,
                        program.tx,
                        objective=recipe.objective,
                        segmented=not recipe.data.cross_document,
                    )
                )
                state, batch = program.fresh_state(), program.to_devices(batch_of(recipe))
                after, metrics = run(state, batch)
                later, told = after, metrics
                for _ in range(STEPS - 1):
                    later, told = run(later, batch)
            pairs = zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
            moved = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
            results[settings] = float(metrics["ce"]), float(told["ce"]), int(told["skipped"]), moved
        return results[settings]

    return step


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_learns(stepped, name):
    ce, later, skipped, moved = stepped(small(load(name)))
    assert abs(ce - np.log(VOCAB)) < 0.2  # a fresh model is as good as a guess
    assert later < ce - 0.05  # of a batch seen before, each step tells something
    assert skipped == 0
    assert all(change > 0 for change in moved)  # every parameter is reached by a gradient
