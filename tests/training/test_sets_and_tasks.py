"""Sets, tasks and the best checkpoint of a run, on eight devices."""

import json

import pytest
from evaluation import small_runs

from adaptive import evaluate, train
from adaptive.errors import DataError
from adaptive.recipe import Recipe
from adaptive.runs.checkpoint import Checkpoints, steps_in
from adaptive.runs.config import CheckpointConfig
from adaptive.training.log import is_evaluation, read_rows
from adaptive.training.loop import Loop
from adaptive.training.sets_and_tasks import opened

pytestmark = pytest.mark.compiles


def test_a_run_scores_its_sets_and_tasks_and_keeps_its_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "own.txt"
    texts.write_text("".join(f"{text}\n<|endoftext|>\n" for text in small_runs.TEXTS))
    rows = [{"query": "Call me", "choices": [f"{c}.", f"{i} ships"], "gold": i % 2} for i, c in enumerate("abcdef")]
    (tmp_path / "names.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(name="made", model=small_runs.PLAIN).with_(
        "train.compute_dtype=float32", "train.batch_size=8", "data.seq_len=32", f"data.paths={texts}",
        "data.source=files", "data.validation_every=2", f"eval.sets=all={texts},validation",
        f"eval.tasks={tmp_path}/names.jsonl", "eval.every=2", "eval.rows=0", "train.steps=6", "log.wandb=disabled",
        "log.sample_tokens=0", "checkpoint.every=0", "checkpoint.keep_last=1", "checkpoint.keep_best=1",
    )  # fmt: skip
    whole = Loop.evaluate
    monkeypatch.setattr(
        Loop, "evaluate", lambda loop, state, step, **how: whole(loop, state, step, **how) and {2: 1.0}.get(step, 2.0)
    )
    assert train.train(recipe, tmp_path / "run") == 0
    found = [row for row in read_rows(tmp_path / "run") if is_evaluation(row)]
    assert [row["step"] for row in found] == [2, 4, 6]
    assert steps_in(tmp_path / "run" / "checkpoints") == [2, 6]  # the best, the newest
    last = found[-1]
    assert last["eval/sets/own/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert last["eval/sets/mean/loss"] == pytest.approx((last["eval/sets/own/loss"] + last["eval/sets/all/loss"]) / 2)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--step", "6", "--data", f"all={texts}"]
    assert evaluate.main([*arguments, "--tasks", f"{tmp_path}/names.jsonl"]) == 0
    told = json.loads((tmp_path / "run" / "evaluations" / "step-6.json").read_text())
    for name in ("loss", "bits_per_byte"):
        assert last[f"eval/sets/all/{name}"] == pytest.approx(told["sets"]["all"]["causal"][name], rel=1e-4)
    assert last["eval/tasks/names/accuracy"] == told["tasks"]["names"]["accuracy"]
    assert last["eval/tasks/mean/centred"] == pytest.approx(told["tasks_mean"]["centred"])


def test_what_cannot_be_read_is_told_before_a_folder_is_made(tmp_path):
    recipe = Recipe(name="made", model=small_runs.PLAIN).with_(f"data.cache_dir={tmp_path}/cache", "data.seq_len=32")
    with pytest.raises(DataError, match=r"eval.sets wiki: there is no such file or folder"):
        train.train(recipe.with_("eval.sets=wiki", "train.batch_size=8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"eval.tasks gone.jsonl: there is no such file"):
        opened(recipe.with_("eval.tasks=gone.jsonl"), None)


def test_the_best_are_the_lowest_of_those_that_were_rated(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_best=2), {})
    kept = [checkpoints.rate(step, loss) for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0), (4, 2.5), (5, 3.0))]
    assert kept == [True, False, True, True, False] and checkpoints.best() == [3, 4]
    assert not checkpoints.rate(6, None) and not Checkpoints(tmp_path, CheckpointConfig(), {}).rate(1, 1.0)
