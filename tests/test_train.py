"""The command as a user meets it: what it refuses, what it prints, what it leaves behind."""

import json

import pytest

from adaptive.train import main
from adaptive.training.log import read_rows

pytestmark = pytest.mark.compiles

BLOCK = ("mixer.heads=2", "mixer.kv_heads=2", "mixer.head_dim=8", "feed_forward.hidden=16")
SMALL = (
    "model.width=16", *(f"model.body.{part}.blocks.0.{text}" for part in ("prelude", "core", "coda") for text in BLOCK),
    "data.seq_len=32", "train.batch_size=8", "train.steps=3", "schedule.warmup_steps=1",
    "log.wandb=disabled", "eval.rows=4", "log.every=1", "log.sample_tokens=5",
)  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder; (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out + err

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "mor_tinny"], ["mor_tinny", "nearest: mor_tiny"]),
        ([], ["which recipe?", "mor_tiny"]),
        (["--recipee", "mor_tiny"], ["recipee"]),
        (["--recipe", "mor_tiny", "steps"], ["'steps' is neither"]),
        (["--recipe", "mor_tiny", "train.stpes=1"], ["train.stpes", "train.steps"]),
        (["--recipe", "mor_tiny", "train.steps=many"], ["train.steps=many", "whole number"]),
        (["--recipe", "mor_tiny", "mesh.fsdp=3"], ["fsdp=3", "8 devices", "1, 2, 4, 8"]),
        (["--recipe", "mor_tiny", "mesh.tensor=8", *SMALL], ["heads=2 does not divide by tensor=8", "1, 2"]),
        (["--recipe", "mor_tiny", "train.batch_size=12"], ["train.batch_size=12", "8 devices", "8, 16"]),
        (
            ["--recipe", "mor_tiny", "train.batch_size=48", "train.device_batch_size=4"],
            ["device_batch_size=4", "6", "3"],
        ),
        (["--recipe", "mor_tiny", "model.body.core.blocks.0.mixer.kv_heads=3"], ["kv_heads=3", "1, 2, 4"]),
        (["--recipe", "mor_tiny", "model.body.depth.capacities=0.3,0.6,1"], ["must not", "1,0.6,0.3"]),
        (["--recipe", "mor_tiny", "data.source=files", "data.paths=missing.txt"], ["missing.txt", "no such file"]),
        (["--recipe", "mor_tiny", "data.tokenizer=missing.json"], ["missing.json"]),
        (["--recipe", "mor_tiny", "model.vocab_size=100"], ["100", "320"]),
    ],
    ids=lambda value: " ".join(value[2:4]) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_at_once(train, tmp_path, arguments, says):
    code, output = train(*arguments)
    assert code == 2
    assert all(text in output for text in says), output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("runs/*"))


def test_without_the_hub_the_same_recipe_on_other_data_is_offered(train, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, output = train("--recipe", "mor_360m", "train.batch_size=8")
    assert code == 2
    assert "python -m adaptive.train" in output and "data=embedded" in output and "data.paths=" in output


def test_inspection_runs_nothing(train, tmp_path, monkeypatch):
    code, output = train("--list_recipes")
    assert code == 0 and "mor_360m" in output and "vanilla_tiny" in output
    code, output = train("--recipe", "mor_tiny", "--print_recipe", "train.steps=7")
    assert code == 0 and "train" in output and "7" in output
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a plan needs no data
    code, output = train("--recipe", "mor_tiny", "--dry_run", "data=fineweb_edu_bytes", *SMALL)
    assert code == 0 and "dry run" in output and "memory" in output and "kernels" in output
    assert "data      not looked at: " in output
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_its_record_and_says_where(train, tmp_path):
    code, output = train("--recipe", "mor_tiny", *SMALL)
    assert code == 0, output
    workdir = tmp_path / "runs" / "mor_tiny-1"
    rows = read_rows(workdir)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert {"eval/loss", "eval/bits_per_byte", "eval/threshold/loss", "eval/routing/accuracy"} <= set(rows[-1])
    assert "http" not in (workdir / "report.html").read_text().replace("http://www.w3.org", "")
    assert json.loads((workdir / "plan.json").read_text())["capacities"] == [32, 21, 10]
    routing = json.loads((workdir / "routing.json").read_text())
    assert len(routing["passage"]) == 32 and len(routing["recursions"]) == 3 and routing["sample"]["prompt"] == "The "
    assert str(workdir.relative_to(tmp_path)) in output and "continuation" in output

    code, output = train("--recipe", "mor_tiny", "--workdir", str(workdir), *SMALL)
    assert code == 0 and "complete at step 3" in output


def test_a_run_that_diverges_stops_with_a_report(train):
    shapes = [text for text in SMALL if not text.startswith(("train.steps", "schedule"))]
    code, output = train(
        "--recipe=mor_tiny", *shapes, "train.steps=20", "train.max_bad_steps=2", "schedule.kind=constant",
        "schedule.warmup_steps=0", "optimizer.learning_rate=1e30",
    )  # fmt: skip
    assert code == 3, output
    assert "2 steps in a row were not finite" in output and "skipped" in output
