"""One run over four, two and one processes that really are some, and a run of two whose processes are killed.

A start of a process costs seconds, so each makes many checks.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import shapes

from adaptive import generate
from adaptive.launch import chaos, local
from adaptive.layers.feed_forwards import experts
from adaptive.layers.moe.routers import token_choice
from adaptive.recipe import load
from adaptive.training.goodput import read_attempts
from adaptive.training.log import read_rows

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[2]
WANDB = """
import json, os

class Run:
    def __getattr__(self, name):
        return lambda *given, **named: None

class Settings(dict):
    model_fields = ()

    def __init__(self, **given):
        super().__init__(given)

def init(**given):
    with open(os.environ["WANDB_HEARD"], "a") as heard:
        heard.write(os.environ.get("ADAPTIVE_PROCESS", "0") + " " + given["id"] + "\\n")
    return Run()

def __getattr__(name):
    return lambda *given, **named: None
"""
SETTINGS = (
    "data.source=files", "data.seq_len=32", "train.batch_size=8", "schedule.kind=constant", "schedule.warmup_steps=2",
    "eval.every=0", "eval.rows=4", "eval.selection=topk", "checkpoint.every=3", "checkpoint.keep_last=9", "log.every=1",
    "log.sample_tokens=0",
)  # fmt: skip


def recipe(folder: Path, **more) -> Path:
    filed = load("vanilla_tiny")
    model = shapes.plain(1, vocab_size=320, width=16, heads=2, kv_heads=2, hidden=16, **more)
    path = folder / "small.json"
    path.write_text(dataclasses.replace(filed, model=model).to_json())
    return path


class Job:
    """`adaptive train` over any number of processes, and what they said."""

    def __init__(self, folder: Path, recipe: Path, *settings: str):
        self.workdir = folder
        self._arguments = [f"--recipe={recipe}", f"--workdir={folder}", *settings]

    def run(self, starter: local.Starter, processes: int, *settings: str) -> tuple[list[int], str]:
        """(exit codes, all output) of a start."""
        given = argparse.Namespace(processes=processes, devices_per_process=1)
        running = local.started(given, [*self._arguments, *settings], starter)
        local.wait(running, threading.Event())
        return [p.popen.returncode for p in running], "".join(line for p in running for line in p.tail)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(workdir) if "loss" in row}


def test_a_run_goes_from_four_processes_to_two_to_one(tmp_path, monkeypatch, capsys):
    """Experts over four, the sequence over two, all on one: every step sees the batch that it would see on one."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("WANDB_HEARD", str(tmp_path / "heard"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    text = np.random.default_rng(0).choice(list("abcdefgh "), 4000)  # one epoch, and rows that all differ
    lines = [json.dumps({"text": "".join(text[i : i + 50])}) + "\n" for i in range(0, 4000, 50)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    routed = experts.Settings(token_choice.Settings(experts_per_token=2), experts=4, expert_size=8)
    own = (
        *SETTINGS,
        "log.wandb=offline",
        "mesh.data=1",
        f"data.paths={tmp_path}/text.jsonl",
        f"data.cache_dir={tmp_path}/cache",
    )
    made = recipe(tmp_path, feed_forward=routed)
    job, alone = Job(tmp_path / "run", made, *own), Job(tmp_path / "alone", made, *own)
    with contextlib.closing(local.Starter("adaptive.train")) as starter:
        codes, output = job.run(starter, 4, "mesh.expert=4", "train.steps=3")
        assert codes == [0] * 4, output
        codes, output = job.run(starter, 2, "mesh.context=2", "train.steps=5")
        assert codes == [0] * 2 and "from step 3" in output and "mesh.expert: 4 -> 1" in output, output
        codes, output = job.run(starter, 1, "train.steps=8")
        assert codes == [0] and "from step 5" in output, output
        codes, output = alone.run(starter, 1, "train.steps=8")
        assert codes == [0], output
    np.testing.assert_allclose([*losses(job.workdir).values()], [*losses(alone.workdir).values()], rtol=1e-4)
    assert [*losses(job.workdir)] == [*range(1, 9)]
    assert chaos.ended(job.workdir)["data_state"] == chaos.ended(alone.workdir)["data_state"]
    held_out = [[r["eval/loss"] for r in read_rows(w) if "eval/loss" in r] for w in (job.workdir, alone.workdir)]
    assert held_out[0][-1] == pytest.approx(held_out[1][-1], rel=1e-4) and len(held_out[0]) == 3
    heard = [line.split() for line in (tmp_path / "heard").read_text().splitlines()]
    assert {process for process, _ in heard} == {"0"} and len({run for _, run in heard[:3]}) == 1 and len(heard) == 4
    assert [(one.first, one.last, one.stopped) for one in read_attempts(job.workdir)] == [
        (0, 3, True),
        (3, 5, True),
        (5, 8, True),
    ]

    asked = ["--workdir", f"{job.workdir}", "--step", "3", "--prompt", "ab", "--tokens", "2"]
    assert generate.main(asked) == 0  # on this process alone, of what four saved
    assert "ab" in capsys.readouterr().out


def test_a_killed_process_changes_no_bit_and_is_named(tmp_path, monkeypatch, capfd):
    """What scripts/chaos does, in small: after a kill all start again without compiling, and end as undisturbed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "disturbed" / "checkpoints"

    def until_there_is_a_checkpoint(killer: chaos.Killer) -> bool:
        while not killer._done.wait(0.05):
            if any(path.name.isdecimal() for path in folder.glob("*")):
                return False
        return True

    monkeypatch.setattr(chaos.Killer, "pause", until_there_is_a_checkpoint)
    monkeypatch.setattr(chaos, "TERM_SHARE", 0.0)
    run = [*SETTINGS[1:], "data=embedded", f"--recipe={recipe(tmp_path)}", "train.steps=30", "log.wandb=disabled"]
    assert chaos.main([f"--workdir={tmp_path}", "--failures=1", "--", *run]) == 0
    out = capfd.readouterr().out
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["same"] and found["step"] == 30 and found["own_account"]["attempts"] == 2
    assert len(found["recovery_s"]) == 1 and 0 < found["own_account"]["goodput"] < 1
    killed, disturbed = found["failures"][0]["process"], out.split("chaos: SIGKILL")[1]
    assert re.search(rf"job: process {killed} on \S+ ended before the others; this process ends, too", disturbed), out
    assert f"process {killed} ended first, with exit code 137; restart 1 of" in disturbed, out
    assert "from the cache" in disturbed and "compiled  in" in disturbed and "resuming" in disturbed, out
