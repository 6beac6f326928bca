"""The layout of experts is a setting of a run: the recipe changes it, the state does not."""

import functools

import jax
import numpy as np
import pytest

from adaptive.errors import MeshError, RecipeError
from adaptive.parallel.mesh import make_mesh
from adaptive.recipe import load
from adaptive.training.program import Program

pytestmark = pytest.mark.compiles

FEED = "model.body.stack.blocks.0.feed_forward"
MODEL = (
    "model.width=32", "model.body.stack.repeats=1", "model.body.stack.blocks.0.mixer.heads=2",
    "model.body.stack.blocks.0.mixer.kv_heads=2", "model.body.stack.blocks.0.mixer.head_dim=8", f"{FEED}=experts",
    f"{FEED}.experts=4", f"{FEED}.expert_size=32", "data.seq_len=16", "train.batch_size=8",
    "train.device_batch_size=0",
)  # fmt: skip
CUBE = ("expert=2", "context=2", "tensor=2")


def program(*overrides: str) -> Program:
    """Of one layer with four experts."""
    recipe = load("vanilla_tiny").with_(*MODEL).with_(*overrides)
    recipe.validate()
    count = recipe.mesh.expert * recipe.mesh.tensor * recipe.mesh.context
    return Program(recipe, make_mesh(recipe.mesh, jax.devices()[:count]))


@functools.cache
def initial() -> tuple:
    """(state, batch) on the host."""
    one = program()
    rng = np.random.default_rng(0)
    shapes = one.abstract_batch()
    tokens = rng.integers(0, 256, shapes.tokens.shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    segments, mask = np.ones_like(tokens), np.ones(tokens.shape, np.float32)
    batch = type(shapes)(tokens, np.roll(tokens, -1, 1), positions, segments, mask)
    return jax.tree.map(np.asarray, jax.device_get(one.fresh_state())), batch


def stepped(*overrides: str):
    """(losses, parameters after a step, the program), from the same state."""
    it = program(*overrides)
    state, batch = initial()
    state = jax.device_put(state, it.shardings)
    after, metrics = it.compile_train_step().call(state, it.to_devices(batch))
    return float(metrics["loss"]), jax.tree.map(np.asarray, after.params), it


@functools.cache
def on_one_device():
    return stepped()[:2]


@pytest.mark.parametrize(
    ("strategy", "execution", "mesh", "held"),
    [
        ("auto", "capacity", ("expert=4", "tensor=2"), (1, 32, 16)),
        ("tensor", "ragged", ("expert=4", "tensor=2"), (4, 32, 4)),
        ("expert", "ragged", (*CUBE, "expert_parallel.over=context,expert"), (1, 32, 16)),
        ("gather", "capacity", (*CUBE, "expert_parallel.over=expert,tensor"), (1, 16, 32)),
    ],
)
def test_one_state_any_layout(strategy, execution, mesh, held):
    """`held` is each device's part of an expert matrix [4, 32, 32]; where experts are split over another axis as well,
    attention splits sequences or heads over it."""
    loss, params, it = stepped(
        *(f"mesh.{one}" for one in mesh),
        f"mesh.expert_parallel.strategy={strategy}",
        f"{FEED}.execution={execution}",
    )
    want_loss, want_params = on_one_device()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    shapes = {
        leaf.sharding.shard_shape(leaf.shape)[-3:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(it.abstract_state().params)
        if "'up'" in jax.tree_util.keystr(path)
    }
    assert shapes == {held}
    assert it.experts.strategy != "auto" and len(it.expert_lines) == 4


def test_what_does_not_fit_is_refused_before_compilation():
    with pytest.raises(RecipeError, match=r"mesh\.expert=8 does not divide the 4 experts; it can be one of 1, 2, 4"):
        program("mesh.expert=8")
    with pytest.raises(RecipeError, match=r"mesh\.expert \* mesh\.context=8 does not divide the 4 experts"):
        program("mesh.expert=2", "mesh.context=4", "mesh.expert_parallel.over=expert,context")
    with pytest.raises(RecipeError, match=r"over=context: must be expert, and may have others of data, fsdp, expert"):
        program("mesh.expert_parallel.over=context")
    with pytest.raises(MeshError, match=r"data.seq_len=18 does not divide over mesh.context=4; .*16, 20"):
        program("mesh.context=4", "data.seq_len=18")
    with pytest.raises(MeshError, match=r"loss_chunk=8 does not divide the 12 .* mesh.context=2 has; .* 6"):
        program("mesh.context=2", "data.seq_len=24", "train.loss_chunk=8")
    with pytest.raises(RecipeError, match=r"mesh\.expert=2: the model has no experts"):
        load("vanilla_tiny").with_("mesh.expert=2").validate()
    with pytest.raises(MeshError, match=r"expert_ff=30 does not divide by expert\*tensor=8"):
        program("mesh.expert=8", "mesh.expert_parallel.strategy=tensor", f"{FEED}.expert_size=30")
    with pytest.raises(MeshError, match=r"mesh\.data \* mesh\.fsdp \* mesh\.expert"):
        program("mesh.expert=4", "train.batch_size=6")
