"""Layers that are split over stages: a step and an evaluation are those of one device, memory does not grow with the
number of micro-batches, and what stages hand on are activations."""

import functools
import math

import hlo
import jax
import numpy as np
import pytest
import shapes
from flax import nnx
from meshes import GRADIENT, RATE, assert_same_step
from train_steps import packed_batch

from adaptive.errors import MeshError
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.parallel.mesh import batch_sharding, make_mesh
from adaptive.parallel.pipeline import Schedule
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import Checkpoints
from adaptive.runs.config import CheckpointConfig
from adaptive.runs.state import initial_state, state_shardings
from adaptive.training.program import Program
from adaptive.training.step import make_train_step

ROWS, SEQ, VOCAB = 8, 8, 48
ATTENDS = {"heads": 4, "kv_heads": 4, "head_dim": 4}
SHAPE = ATTENDS | {"hidden": 32, "width": 16, "vocab_size": VOCAB, "init_std": 0.1, "embedding_std": 0.1}
ROUTED = shapes.block(feed_forward=experts.Settings(token_choice.Settings(bias=True), expert_size=16), **ATTENDS)
MODELS = {
    "plain": shapes.plain(4, **SHAPE),
    "untied": shapes.plain(4, **SHAPE, tie_embeddings=False),
    "hybrid": shapes.recursive(
        4, 1, ends=0, pattern=[shapes.block(**ATTENDS), shapes.block(mixer="mamba2", **ATTENDS)], **SHAPE
    ),
    "experts": shapes.recursive(4, 2, ends=0, shared="mixers", pattern=[ROUTED], **SHAPE),
    "recursive": shapes.recursive(6, 2, **SHAPE),
    "mor": shapes.mor(4, 2, ends=0, **SHAPE),
    "hnet": shapes.hnet(("m1", ("T2",), "t1"), vocab_size=VOCAB),
}
# Micro-batches of the step on one device; those of a pipeline, or the whole batch where passes are apart.
CASES = [
    ("plain", "mesh.stage=4", 8),
    ("untied", "mesh.stage=2 mesh.stage_groups=2 mesh.tensor=2", 4),
    ("hybrid", "mesh.stage=2", 4),
    ("experts", "mesh.stage=2", 2),
    ("recursive", "mesh.stage=2 mesh.fsdp=2", 4),
    ("mor", "mesh.stage=2 mesh.data=2", 1),
    ("hnet", "mesh.stage=2", 1),
]


def program_of(name: str, mesh: str = "", rows: int = ROWS, micro_batches: int = 1) -> Program:
    recipe = Recipe(name="made", model=MODELS[name]).with_(f"train.batch_size={rows}", f"data.seq_len={SEQ}")
    recipe = recipe.with_("mesh.data=1").with_(*mesh.split())
    shape = {axis: getattr(recipe.mesh, axis) for axis in ("data", "fsdp", "tensor", "stage")}
    if micro_batches > 1:
        recipe = recipe.with_(f"train.device_batch_size={rows // micro_batches // shape['data'] // shape['fsdp']}")
    return Program(recipe, make_mesh(recipe.mesh, jax.devices()[: math.prod(shape.values())]))


@functools.cache
def on_host(name: str):
    make = jax.jit(lambda key: initial_state(MODELS[name].build, GRADIENT, key))
    return jax.tree.map(np.asarray, make(jax.random.key(0)))


@functools.cache
def compiled(name: str, mesh: str = "", rows: int = ROWS, micro_batches: int = 1):
    """(the program, where its state lives, its step)."""
    program = program_of(name, mesh, rows, micro_batches)
    accumulation = program.accumulation
    step = make_train_step(program.graphdef, GRADIENT, accumulation=accumulation, pipeline=program.pipeline)
    where = state_shardings(program.build, GRADIENT, program.mesh, program.rules)
    with program.placed():
        given = jax.device_put(on_host(name), where), placed(program, rows)
        return program, where, jax.jit(step, out_shardings=(where, None)).lower(*given).compile()


def placed(program: Program, rows: int = ROWS):
    return jax.device_put(packed_batch(rows, SEQ, VOCAB), batch_sharding(program.mesh, program.rules))


def stepped(name: str, mesh: str = "", micro_batches: int = 1):
    """(metrics, gradient of every parameter, buffers) of one step."""
    program, where, step = compiled(name, mesh, micro_batches=micro_batches)
    before = on_host(name)
    after, metrics = step(jax.device_put(before, where), placed(program))
    grads = jax.tree.map(lambda a, b: (a - np.asarray(b)) / RATE, before.params, after.params)
    return jax.tree.map(np.asarray, metrics), grads, jax.tree.map(np.asarray, after.buffers)


# What is computed


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "mesh", "micro_batches"), CASES, ids=[case[0] for case in CASES])
def test_a_step_in_stages_equals_one_device(name, mesh, micro_batches):
    assert_same_step(stepped(name, mesh, micro_batches), stepped(name, "", micro_batches))


@pytest.mark.compiles
def test_an_evaluation_in_stages_equals_one_device():
    """Logits, depths and what layers told of positions and of their sums."""
    name = "experts"

    def evaluated(program):
        def forward(params, buffers, batch):
            model = nnx.merge(program.graphdef, params, buffers)
            out = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
            told = {path: {k: v for k, v in one.stats.items() if k != "calls"} for path, one in out.trace.told.items()}
            each = {path: one.per_token for path, one in out.trace.told.items()}
            return out.logits, out.aux.scalars(), out.trace.depth, told, each

        where = state_shardings(program.build, GRADIENT, program.mesh, program.rules)
        state = jax.device_put(on_host(name), where)
        with program.placed():
            out = jax.jit(forward)(state.params, state.buffers, placed(program))
        return jax.tree.leaves_with_path(jax.tree.map(np.asarray, out))

    apart, whole = evaluated(program_of(name, "mesh.stage=2")), evaluated(program_of(name))
    for (path, got), (_, want) in zip(apart, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.compiles
def test_memory_does_not_grow_with_micro_batches_and_activations_alone_travel():
    """Twice as many micro-batches of as many rows: only what there is of tokens doubles."""
    (_, _, short), (program, _, long) = (compiled("plain", "mesh.stage=4", rows, rows) for rows in (ROWS, 2 * ROWS))
    assert program.pipeline.micro_batches == 2 * ROWS
    more = long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes
    stream = SEQ * SHAPE["width"] * 4  # bytes of one micro-batch's activations
    assert more < ROWS * stream / 2
    text = long.as_text()
    assert set(hlo.collectives(text)) == {"all-reduce", "collective-permute"}
    sent = [size for kind, size in hlo.moved(text).items() if kind.startswith("collective-permute")]
    assert sum(sent) == 2 * stream  # once forward, once backward, in the loop over ticks


@pytest.mark.compiles
def test_a_checkpoint_of_stages_is_that_of_one_device(tmp_path):
    name = "plain"
    states = []
    for mesh in ("mesh.stage=2", ""):
        program = program_of(name, mesh)
        states.append(
            jax.device_put(on_host(name), state_shardings(program.build, GRADIENT, program.mesh, program.rules))
        )
    saved, fresh = states
    q = saved.params["body"]["stack"]["blocks"][0]["mixer"]["q"].get_value()
    assert q.addressable_shards[0].data.shape[0] == 2 and q.shape[0] == 4
    opened = lambda: Checkpoints(tmp_path, CheckpointConfig(), {"name": "r", "seed": 0}, say=print)  # noqa: E731
    checkpoints = opened()
    checkpoints.save(1, saved, {"index": 0})
    checkpoints.close()
    checkpoints = opened()
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh)
    restored = checkpoints.restore(abstract)
    checkpoints.close()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), restored.state, on_host(name)))


# The schedule


@pytest.mark.compiles
@pytest.mark.parametrize(("stages", "rounds", "micro_batches"), [(4, 1, 6), (4, 1, 2), (2, 3, 4), (4, 2, 6)])
def test_every_stage_computes_every_round_of_every_micro_batch_once_each_way(stages, rounds, micro_batches):
    """In order, one at a time, and from inputs that are still there."""
    schedule, done = Schedule(stages, rounds, micro_batches), {}
    for way in (schedule.forward, schedule.backward):
        for tick in range(schedule.ticks):
            for stage in range(stages):
                at = way(tick, stage)
                if bool(at.valid):
                    key = way.__name__, stage, int(at.round), int(at.micro)
                    assert key not in done
                    done[key] = tick
    assert len(done) == 2 * stages * rounds * micro_batches
    for (way, stage, round_, micro), tick in done.items():
        if way == "forward":
            assert schedule.when()[stage, round_, micro] == tick < schedule.forward_ticks
            before = ("forward", (stage - 1) % stages, round_ - (stage == 0), micro)
            assert before not in done or done[before] == tick - 1
        else:
            kept = done["forward", stage, round_, micro]
            assert 0 <= tick - kept < schedule.slots
            at = schedule.backward(tick, stage)
            assert schedule.slot(tick, at) == kept % schedule.slots
            after = ("backward", (stage + 1) % stages, round_ + (stage == stages - 1), micro)
            assert after not in done or done[after] == tick - 1


def test_share_of_idle_time():
    assert Schedule(4, 1, 12).idle() == pytest.approx(3 / 15)
    assert Schedule(4, 3, 12).idle() == pytest.approx(3 / 39)


# What is refused and what is said


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("plain", "mesh.stage=8", "mesh.stage=8 does not divide the 4 layers that stages share; it can be 1, 2, 4"),
        ("plain", "mesh.stage=4 mesh.stage_groups=2", "with mesh.stage_groups=2 .* it can be 1, 2"),
        ("hybrid", "mesh.stage=4", "2 repeats of its pattern of 2 layers .* it can be 1, 2"),
        ("mor", "mesh.stage=2 model.body.keys_values=shared", "keys_values=shared: .* or keys_values=per_recursion"),
    ],
)
def test_stages_that_cannot_be_are_refused(name, settings, message):
    recipe = Recipe(name="made", model=MODELS[name]).with_("mesh.data=1", *settings.split())
    with pytest.raises(MeshError, match=message):
        Program(recipe, make_mesh(recipe.mesh, jax.devices()[: recipe.mesh.stage]))


def test_the_plan_tells_the_schedule():
    (line,) = program_of("plain", "mesh.stage=2", micro_batches=8).pipeline_lines
    assert line == "2 stages, 1F1B, 8 micro-batches: stages are idle for 11% of the time"
    circular, few = program_of("recursive", "mesh.stage=2 mesh.data=4", rows=4).pipeline_lines
    assert "circular, 2 rounds" in circular and "raise train.batch_size to 8 or more" in few
