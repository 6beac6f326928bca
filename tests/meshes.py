"""A train step of small models on emulated devices: what it computes, and the collectives that were recorded of it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hlo
import jax
import numpy as np
import optax
import pytest
from train_steps import compiled_step, packed_batch

from adaptive.models.language_model import Settings
from adaptive.objectives import Objective
from adaptive.parallel.support import UNSUPPORTED, parts_of

ROWS, SEQ, VOCAB = 8, 16, 64
# Sizes of data, fsdp, expert, tensor and context.
SIZES = "data", "fsdp", "expert", "tensor", "context"
Mesh = tuple[int, ...]
ONE = (1, 1, 1, 1)
REPLICAS, MIXED, TENSOR = (8, 1, 1, 1), (2, 2, 1, 2), (1, 1, 1, 8)
MIXED_EXPERT = (1, 2, 2, 2)
CONTEXT, CONTEXT_EXPERT = (1, 2, 1, 2, 2), (1, 1, 2, 2, 2)
RATE = 1e3  # parameters move so far that rounding them does not hide their gradient
GRADIENT = optax.sgd(RATE)
COLLECTIVES = Path(__file__).with_name("parallel") / "collectives.json"
RECORD = "ADAPTIVE_RECORD=1 ./scripts/test tests/parallel -k number_of_collectives"


def stepped(model: Settings, mesh: Mesh, objective: Objective | None = None) -> tuple[Any, Any, Any]:
    """(metrics, gradient of every parameter, buffers) of one step."""
    program = compiled_step(model, GRADIENT, mesh, ROWS, SEQ, objective=objective)
    state = program.state()
    before = jax.tree.map(np.array, state.params)
    after, metrics = program.run(state, packed_batch(ROWS, SEQ, VOCAB))
    grads = jax.tree.map(lambda a, b: (a - np.asarray(b)) / RATE, before, after.params)
    return jax.tree.map(np.asarray, metrics), grads, jax.tree.map(np.asarray, after.buffers)


def assert_same_step(got: tuple[Any, Any, Any], want: tuple[Any, Any, Any], *, but: str = "-") -> None:
    """Metrics, except those with `but` in their name, gradients and buffers are equal; every parameter has a
    gradient."""
    assert got[0].keys() == want[0].keys() and got[0]["loss"] > 0
    for key, value in want[0].items():
        if but not in key:
            np.testing.assert_allclose(got[0][key], value, rtol=2e-5, atol=2e-6, err_msg=key)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want[1]), jax.tree.leaves(got[1]), strict=True):
        scale = np.abs(a).max()
        assert scale > 0, path
        np.testing.assert_allclose(b, a, atol=3e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want[2]), jax.tree.leaves(got[2]), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, err_msg=jax.tree_util.keystr(path))


def assert_every_part_split(models: dict[str, Settings], cases: Sequence[tuple[str, Mesh]]) -> None:
    """Of these models, by the cases, along every axis; or the table says why it cannot be. `data`, `fsdp` and `expert`
    split the batch alike, `fsdp` and `context` the parameters; stages are those of test_pipeline."""
    found: dict[str, set[str]] = {}
    for name, mesh in cases:
        for part in (part for part in parts_of(models[name]) if "=" not in part):
            axes = {axis for axis, size in zip(SIZES, mesh, strict=False) if size > 1}
            found[part] = found.get(part, set()) | axes
    for part, axes in found.items():
        refused = {one.axis for one in UNSUPPORTED if one.beside == part}
        wanted = {"tensor", "context"} | ({"expert"} if part.startswith("routers") else set())
        assert wanted - refused <= axes and axes & {"data", "fsdp", "expert"}, part


def collectives(model: Settings, mesh: Mesh) -> dict[str, int]:
    """Of the compiled step, by kind."""
    return hlo.collectives(compiled_step(model, GRADIENT, mesh, ROWS, SEQ).compiled.as_text())


def assert_recorded(name: str, model: Settings, mesh: Mesh) -> None:
    """The compiled step has the same collectives as recorded, and they move as many bytes; records them if
    ADAPTIVE_RECORD is set. Other jax versions compile other programs."""
    text = compiled_step(model, GRADIENT, mesh, ROWS, SEQ).compiled.as_text()
    sizes = hlo.moved(text)
    found = {
        kind: {"number": number, "bytes": sum(size for key, size in sizes.items() if key.split()[0] == kind)}
        for kind, number in hlo.collectives(text).items()
    }
    version = ".".join(jax.__version__.split(".")[:2])
    recorded = json.loads(COLLECTIVES.read_text())
    if os.environ.get("ADAPTIVE_RECORD"):
        recorded.setdefault(version, {})[name] = found
        COLLECTIVES.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
        return
    if version not in recorded:
        pytest.skip(f"collectives are not recorded for jax {version}; {RECORD} records them")
    assert found == recorded[version][name], f"if the change is meant, explain it in the commit and run:\n  {RECORD}"
