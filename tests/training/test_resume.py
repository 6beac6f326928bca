"""The command itself, killed, stopped, resumed, damaged and asked for the impossible, as a user would see it."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import shapes

from adaptive.recipe import load
from adaptive.training.log import read_rows

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
TINY = (
    "data.seq_len=32", "train.batch_size=8", f"train.steps={STEPS}", "schedule.warmup_steps=4", "train.seed=5",
    "eval.every=0", "eval.rows=2", "eval.selection=topk", "checkpoint.every=5", "checkpoint.keep_last=3",
    "checkpoint.keep_every=30", "log.every=1", "log.wandb=disabled", "log.sample_tokens=0",
)  # fmt: skip
SPLIT = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")


@functools.cache
def recipe() -> str:
    """A file with mor_tiny, smaller."""
    filed = load("mor_tiny")
    shape = {"heads": 2, "kv_heads": 2, "hidden": 16}
    model = shapes.mor(
        5, 3, filed.model.body.depth, vocab_size=filed.model.vocab_size, width=16, init_std=0.02, **shape
    )
    path = Path(tempfile.mkdtemp()) / "small.json"
    path.write_text(dataclasses.replace(filed, model=model).to_json())
    return str(path)


class Run:
    """`python -m adaptive.train` in a workdir."""

    def __init__(self, workdir: Path, *arguments: str):
        self.workdir = workdir
        command = [
            sys.executable,
            "-m",
            "adaptive.train",
            f"--recipe={recipe()}",
            f"--workdir={workdir}",
            *TINY,
            *arguments,
        ]
        self._out = (workdir.parent / f"{workdir.name}.out").open("a+")
        self._from = self._out.tell()
        self.popen = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=self._out, stderr=subprocess.STDOUT)

    def output(self) -> str:
        self._out.seek(self._from)
        return self._out.read()

    def until(self, condition) -> None:
        due = time.monotonic() + 180
        while not condition():
            assert self.popen.poll() is None, f"ended before its time:\n{self.output()}"
            assert time.monotonic() < due, f"nothing came:\n{self.output()}"
            time.sleep(0.01)

    def end(self, expect: int) -> str:
        try:
            code = self.popen.wait(timeout=240)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            pytest.fail(f"did not end:\n{self.output()}")
        output = self.output()
        self._out.close()
        assert code == expect, output
        return output


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def about(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "about" / "metadata").read_text())


def losses(workdir: Path) -> dict[int, float]:
    rows = [row for row in read_rows(workdir) if "loss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    Run(workdir, *SPLIT).end(0)
    return workdir


def test_a_run_that_was_stopped_and_damaged_is_the_run_that_was_not(straight, tmp_path):
    """Killed ones, and other meshes, are in test_several_processes.py."""
    workdir = tmp_path / "run"
    stopped = Run(workdir, *SPLIT)
    stopped.until(lambda: len(saved_steps(workdir)) > 1)
    stopped.popen.send_signal(signal.SIGTERM)
    output = stopped.end(75)
    *_, before, last = saved_steps(workdir)
    assert before < last < STEPS
    assert "SIGTERM" in output and f"step {last}" in output, output  # where it stopped

    (workdir / "checkpoints" / str(last) / "about" / "metadata").write_text("{")
    output = Run(workdir, *SPLIT).end(0)
    assert re.search(rf"warning: checkpoint {last} cannot be read .*going on from step {before}\b", output), output
    assert losses(workdir) == losses(straight)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    assert about(workdir, STEPS)["digest"] == about(straight, STEPS)["digest"]
    assert about(workdir, STEPS)["data_state"] == about(straight, STEPS)["data_state"]


def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    output = Run(workdir, *SPLIT, "model.body.depth.alpha=0.2", "optimizer.learning_rate=0.5").end(2)
    assert "model.body.depth.alpha: 0.1 -> 0.2" in output and "optimizer.learning_rate: 0.0025 -> 0.5" in output
    assert "Traceback" not in output
    path = workdir / "checkpoints" / str(STEPS) / "about" / "metadata"
    path.write_text(json.dumps({**about(workdir, STEPS), "format_version": 2}))
    output = Run(workdir, *SPLIT).end(2)
    assert "checkpoint format 2" in output and "Traceback" not in output
    assert saved_steps(workdir) == saved_steps(straight) and losses(workdir) == losses(straight)
