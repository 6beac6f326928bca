"""What the loop says of rows and of steps that fail; whole runs are in test_resume.py."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
import shapes

from adaptive.layers.feed_forwards import experts
from adaptive.recipe import Recipe
from adaptive.training.alarms import alarms
from adaptive.training.log import MetricsLog
from adaptive.training.loop import Loop
from adaptive.training.program import profiled
from adaptive.training.progress import Progress
from adaptive.training.tracking import Several


def test_an_alarm_of_experts_is_said_when_its_row_is_recorded():
    said = []
    loop = types.SimpleNamespace(
        log=MetricsLog(None),
        progress=Progress(10, enabled=False),
        tracker=Several(),
        alarms=alarms(shapes.plain(feed_forward=experts.Settings()).facts()),
        say=said.append,
    )
    row = {"step": 1, "experts/by_layer/layer": [0], "experts/by_layer/dropped_fraction": [0.3]}
    for _ in range(3):
        Loop.record(loop, {**row, "experts/load": [[0.5, 0.5]]})
    assert len(said) == 1 and said[0].startswith("warning: ") and "30% in layer 0" in said[0]


@pytest.mark.parametrize(
    ("begin", "start", "count", "steps", "traced"),
    [
        (0, 3, 2, 9, [3, 4]),
        (4, 3, 2, 9, [4]),  # resumed inside the window
        (5, 3, 2, 9, []),
        (0, 7, 5, 9, [7, 8]),  # the run ends before the window does
        (0, 9, 2, 9, []),
        (0, 0, 0, 9, []),
    ],
)
def test_a_trace_is_of_the_steps_that_are_taken_of_its_window(begin, start, count, steps, traced, monkeypatch):
    on, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: on.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: on.pop())
    recipe = Recipe(name="made").with_(
        f"train.steps={steps}", f"log.profile_start={start}", f"log.profile_steps={count}"
    )  # fmt: skip
    for step in range(begin, steps):
        with profiled(step, begin, recipe, Path("profile")):
            seen += [step] * bool(on)
    assert seen == traced and not on


def test_steps_that_are_not_finite_are_told_of_by_their_scalars():
    folder = types.SimpleNamespace(path=Path("run"))
    loop = types.SimpleNamespace(bad_in_row=3, folder=folder)
    metrics = {
        "loss": np.float32(np.nan),
        "grad_norm": np.float32(1),
        "told/mixer:z": np.full(2, np.nan),
    }
    message = Loop.not_finite(loop, 7, metrics)
    assert "3 steps in a row" in message and "(loss nan)" in message
