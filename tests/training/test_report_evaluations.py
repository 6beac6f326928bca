"""Evaluations on the page of a run."""

import json

from training.example_run import write_example

from adaptive.training.report.page import write_report

ONE = {
    "targets": 517, "loss": 2.5, "loss_interval": [2.4, 2.6], "bits_per_byte": 3.25, "bits_per_byte_interval": None,
    "accuracy": 0.5, "calibration": {"error": 0.125}, "resampled": "documents",
    "by_context": [{"from": 1, "to": 1, "targets": 2, "loss": 5.0}, {"from": 2, "to": 3, "targets": 3, "loss": 4.5}],
}  # fmt: skip
TOLD = {
    "format": 1, "time": "2026-11-30T00:00:00+00:00", "step": 7, "rules": ["train", "causal"],
    "sets": {"wiki<b>": {"train": ONE, "causal": ONE | {"loss": 2.75}}, "code": {"train": ONE, "causal": ONE}},
    "macro": {"train": ONE, "causal": ONE},
    "difference": {"wiki<b>": {"loss": 0.25, "loss_interval": [0.2, 0.3]}},
    "depths": {"trained": 3, "says": "falling by 0.5000 nats",
               "points": [{"passes": 1, "loss": 3.0}, {"passes": 2, "loss": 2.5}]},
    "caches": {"points": [{"cache": "last", "exact": False, "bytes_per_token": 1548.0, "loss": 2.875,
                           "loss_interval": None, "difference": {"loss": 0.125, "loss_interval": [0.1, 0.2]}}]},
    "tasks": {"piqa": {"kind": "multiple_choice", "items": 9, "shots": 1, "accuracy": 0.75, "accuracy_interval": None,
                       "centred": 0.5, "centred_interval": [0.1, 0.9]}},
    "tasks_mean": {"core": False, "centred": 0.5},
}  # fmt: skip


def test_evaluations_are_on_the_page(tmp_path):
    run = write_example(tmp_path / "run", steps=100)
    assert "Evaluations" not in write_report(run).read_text()
    folder = run / "evaluations"
    folder.mkdir()
    (folder / "final.json").write_text(json.dumps(TOLD))
    (folder / "cut.json").write_text('{"format": 1, "sets": {"a": {"train": {}}}, "rules": ["train"]}')
    (folder / "newer.json").write_text('{"format": 99}')
    (folder / "torn.json").write_text("{")
    page = write_report(run).read_text()
    for text in ("final: step 7", "wiki&lt;b&gt;", "2.5000 [2.400, 2.600]",
                 "causal selection costs +0.2500 [+0.2000, +0.3000]",
                 "inexact", "1,548", "+0.1250 [+0.1000, +0.2000]",
                 "falling by 0.5000 nats; trained with 3", "mean of sets", "piqa", "0.5000 [0.100, 0.900]",
                 "cut.json is no evaluation that can be read"):  # fmt: skip
        assert text in page, text
    assert "newer" not in page and "torn" not in page and "Sets and tasks" not in page
    columns = {"eval/sets/wiki/bits_per_byte": 1.5, "eval/sets/wiki/loss": 2.0, "eval/tasks/mean/centred": 0.25}
    with (run / "metrics.jsonl").open("a") as rows:
        rows.writelines(
            json.dumps({"step": 100, "tokens": step, "eval/loss": 2.0, **columns}) + "\n" for step in (8, 9)
        )
    page = write_report(run).read_text()
    for text in ("Sets and tasks", "Sets while training", "Tasks while training"):
        assert text in page, text
