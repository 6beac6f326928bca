"""A workdir is one run's alone: nothing of another is overwritten, and only one process trains in it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from adaptive.errors import CheckpointError
from adaptive.recipe import Recipe
from adaptive.runs import folder
from adaptive.runs.folder import RunFolder

RECIPE = Recipe(name="here")


def test_a_fresh_folder_gets_a_recipe_and_an_identity(tmp_path):
    path = tmp_path / "runs" / "one"
    with RunFolder.open(path, RECIPE) as run:
        assert Recipe.from_json(run.recipe.read_text()) == RECIPE
        first = run.run_id
        assert run.checkpoints == path / "checkpoints" and run.metrics == path / "metrics.jsonl"
    with RunFolder.open(path, RECIPE) as run:
        assert run.run_id == first != ""
    with RunFolder.open(tmp_path / "two", RECIPE) as other:
        assert other.run_id != first


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    RunFolder.open(tmp_path, RECIPE).close()
    kept = (tmp_path / "recipe.json").read_text()
    with pytest.raises(CheckpointError) as error:
        RunFolder.open(tmp_path, RECIPE.with_("train.steps=7", "train.seed=3", "log.every=3"))
    text = str(error.value)
    assert f"train.steps: {RECIPE.train.steps} -> 7" in text and "train.seed: 0 -> 3" in text
    assert "log.every" not in text  # free to change
    assert "another --workdir" in text
    assert (tmp_path / "recipe.json").read_text() == kept
    RunFolder.open(tmp_path, RECIPE).close()  # a refusal leaves no claim


def checkpoint(workdir, step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)


CONSTANT = RECIPE.with_("schedule.kind=constant", "train.steps=6")
TRAPEZOID = RECIPE.with_("schedule.warmup_steps=2", "schedule.decay_fraction=0.5", "train.steps=20")


@pytest.mark.parametrize(("recipe", "taken", "steps"), [(CONSTANT, 6, 12), (TRAPEZOID, 10, 40), (CONSTANT, 4, 5)])
def test_a_run_may_be_longer_where_the_steps_taken_stay_as_they_were(tmp_path, recipe, taken, steps):
    said = []
    RunFolder.open(tmp_path, recipe).close()
    checkpoint(tmp_path, taken)
    longer = recipe.with_(f"train.steps={steps}")
    RunFolder.open(tmp_path, longer, say=said.append).close()
    assert len(said) == 1 and f"train.steps: {recipe.train.steps} -> {steps}" in said[0]
    assert Recipe.from_json((tmp_path / "recipe.json").read_text()) == longer


@pytest.mark.parametrize(
    ("taken", "changes", "part"),
    [
        (11, ["train.steps=40"], "step 11 of the 11 taken would have had another learning rate"),
        (10, ["train.steps=9"], "step 10 of the 10 taken"),
        (10, ["train.steps=40", "train.seed=1"], "train.seed: 0 -> 1"),
    ],
)
def test_a_run_is_not_made_longer_where_they_would_have_been_others(tmp_path, taken, changes, part):
    RunFolder.open(tmp_path, TRAPEZOID).close()
    checkpoint(tmp_path, taken)
    with pytest.raises(CheckpointError) as error:
        RunFolder.open(tmp_path, TRAPEZOID.with_(*changes))
    assert part in str(error.value) and f"--init_from {tmp_path}" in str(error.value)


def test_what_is_noted_of_a_run_is_there_at_the_next_start(tmp_path):
    with RunFolder.open(tmp_path, RECIPE) as run:
        assert (run.saved, run.finished) == (0, 0)
        run.note(saved=3)
        run.note(saved=5, finished=5)
        first = run.run_id
    with RunFolder.open(tmp_path, RECIPE) as run:
        assert (run.saved, run.finished, run.run_id) == (5, 5, first)
    for odd in ("[" * 100_000, '{"run_id": "a", "saved": Infinity}', "3"):
        (tmp_path / "run.json").write_text(odd)
        with RunFolder.open(tmp_path, RECIPE) as run:
            assert run.saved == 0 and run.run_id not in ("", "a")


def test_free_settings_may_change_and_are_announced(tmp_path):
    said = []
    RunFolder.open(tmp_path, RECIPE, say=said.append).close()
    changed = RECIPE.with_("mesh.fsdp=4", "log.every=3")
    RunFolder.open(tmp_path, changed, say=said.append).close()
    (line,) = said
    assert "mesh.fsdp: 1 -> 4" in line and "log.every: 10 -> 3" in line
    assert Recipe.from_json((tmp_path / "recipe.json").read_text()) == changed


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"not the folder of a run.*thesis\.tex"):
        RunFolder.open(tmp_path, RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "run.lock").write_text("")
    (tmp_path / ".recipe.json.123").write_text("{")
    RunFolder.open(tmp_path, RECIPE).close()


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 999}', "[]"])
def test_a_recipe_that_cannot_be_read_is_an_error_and_stays(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"recipe\.json"):
        RunFolder.open(tmp_path, RECIPE)
    assert (tmp_path / "recipe.json").read_text() == content


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="is a file"):
            RunFolder.open(path, RECIPE)


@pytest.mark.parametrize("exists", [False, True])
def test_no_permission_is_said_at_once(tmp_path, exists):
    path = tmp_path / "closed" / "run" if not exists else tmp_path / "closed"
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    user = os.geteuid()
    if user == 0:  # permissions bind everyone else: be someone else, who may look but not write
        for above in [tmp_path, *tmp_path.parents][:-2]:
            above.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"cannot write to .*closed.*Permission denied.*another --workdir"):
            RunFolder.open(path, RECIPE)
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o755)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        RunFolder.open(tmp_path, RECIPE),
        pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"),
    ):
        RunFolder.open(tmp_path, RECIPE)
    RunFolder.open(tmp_path, RECIPE).close()


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path):
    program = f"""
import os, signal
from adaptive.recipe import Recipe
from adaptive.runs.folder import RunFolder
RunFolder.open({str(tmp_path)!r}, Recipe(name="here"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", program])
    killed.wait(timeout=120)
    said = []
    RunFolder.open(tmp_path, RECIPE, say=said.append).close()
    assert said == [
        f"{tmp_path}: process {killed.pid} on {socket.gethostname()} ended without closing this run; taking over"
    ]


def test_a_claim_from_another_host_holds_as_long_as_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SILENCE_S", 0.5)
    RunFolder.open(tmp_path, RECIPE).close()
    file = os.open(tmp_path / "run.lock", os.O_RDWR)
    done = threading.Event()

    def claim(beats):
        os.pwrite(file, f"{json.dumps({'pid': 1, 'host': 'elsewhere', 'beats': beats}):<200}".encode(), 0)

    def beat():
        beats = 1
        while not done.wait(0.02):
            claim(beats := beats + 1)

    claim(1)
    other = threading.Thread(target=beat)
    other.start()
    said = []
    try:
        with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"):
            RunFolder.open(tmp_path, RECIPE, say=said.append)
    finally:
        done.set()
        other.join()
    os.close(file)
    RunFolder.open(tmp_path, RECIPE, say=said.append).close()  # silent now
    assert said[-1].endswith("process 1 on elsewhere ended without closing this run; taking over")


def test_a_running_process_renews_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "BEAT_S", 0.02)
    with RunFolder.open(tmp_path, RECIPE):
        first = (tmp_path / "run.lock").read_bytes()
        due = time.monotonic() + 30
        while (tmp_path / "run.lock").read_bytes() == first:
            assert time.monotonic() < due
            time.sleep(0.01)


def test_other_processes_of_a_job_write_nothing(tmp_path):
    run = RunFolder.open(tmp_path / "run", RECIPE, primary=False)
    assert run.checkpoints == tmp_path / "run" / "checkpoints"
    run.close()
    assert not (tmp_path / "run").exists()
