"""Compiled train steps of small models, for tests."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax

from adaptive.data.batch import Batch
from adaptive.models.language_model import Settings
from adaptive.objectives import Objective
from adaptive.parallel.config import MeshConfig
from adaptive.parallel.mesh import batch_sharding, make_mesh
from adaptive.parallel.rules import AxisRules, placement
from adaptive.runs.state import Build, TrainState, abstract_model, initial_state, state_shardings
from adaptive.training.step import Metrics, make_train_step

RULES = AxisRules()


def packed_batch(rows: int, seq: int, vocab: int, seed: int = 0) -> Batch:
    """Random tokens of two documents per row, a tenth of the targets masked, unevenly over rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, seq + 1)).astype(np.int32)
    second = np.arange(seq)[None] >= rng.integers(1, seq, (rows, 1))
    positions = np.arange(seq) - np.where(second, second.argmax(1)[:, None], 0)
    mask = rng.random((rows, seq)) > 0.2 * rng.random((rows, 1))
    segments = 1 + second.astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions.astype(np.int32), segments, mask.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: `state()` makes a fresh state each time, `run` consumes one."""

    build: Build
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    shardings: TrainState
    compiled: jax.stages.Compiled

    def state(self) -> TrainState:
        return jax.device_put(_initial(self.build, self.tx), self.shardings)

    def run(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.compiled(state, jax.device_put(batch, batch_sharding(self.mesh, RULES)))


@functools.cache
def compiled_step(
    model: Settings, tx: optax.GradientTransformation, mesh: tuple[int, ...], rows: int, seq: int,
    accumulation: int = 1, objective: Objective | None = None,
) -> Program:  # fmt: skip
    """The train step of a model on a mesh of the first devices, for batches [rows, seq]."""
    devices = make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])
    build = _build(model)
    graphdef, _ = abstract_model(build)
    step = make_train_step(graphdef, tx, accumulation=accumulation, objective=objective)
    shardings = state_shardings(build, tx, devices, RULES)
    program = Program(build, tx, devices, shardings, None)
    with placement(devices, RULES):
        batch = jax.device_put(packed_batch(rows, seq, model.vocab_size), batch_sharding(devices, RULES))
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(program.state(), batch)
        return dataclasses.replace(program, compiled=lowered.compile())


@functools.cache
def _build(model: Settings) -> Build:
    return model.build


@functools.cache
def _initial(build: Build, tx: optax.GradientTransformation) -> TrainState:
    """Made once, on the host: compiling the initialisation for every mesh would cost more than the tests."""
    make = jax.jit(lambda key: initial_state(build, tx, key))
    return jax.tree.map(np.asarray, make(jax.random.key(0)))
