"""New folders of runs, and how a run came about."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptive.errors import CheckpointError
from adaptive.runs.claim import claim
from adaptive.runs.origin import STARTS_FILE, record_start, starts
from adaptive.train import new_workdir


def test_of_many_at_once_each_gets_a_folder_of_its_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim(tmp_path / "runs", "a"), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert len(list((tmp_path / "runs").iterdir())) == 24


def test_a_gap_is_filled_and_a_file_is_in_the_way(tmp_path):
    for name in ("a-1", "a-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-2").touch()
    assert claim(tmp_path, "a") == 4


def test_where_no_folder_can_be_made_it_is_told(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(CheckpointError, match=r"cannot make the folder .*a-1: .*choose a --workdir"):
        claim(tmp_path / "runs", "a")


def test_a_folder_that_stays_empty_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), new_workdir("a") as refused:
        assert refused.is_dir()
        raise ZeroDivisionError
    assert not list(tmp_path.glob("runs/*"))
    with new_workdir("a") as used:
        (used / "file").touch()
    with new_workdir("a") as other:
        assert other.name == "a-2"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a-1"]


def test_every_start_is_kept_with_where_its_code_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "adaptive.train", "log.sample_prompt=a b"])
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "mine.py").write_text("1")
    git("add", "mine.py")
    git("commit", "-m", "first")
    (tmp_path / "run").mkdir()
    record_start(tmp_path / "run")
    (tmp_path / "mine.py").write_text("2")
    record_start(tmp_path / "run")
    clean, changed = starts(tmp_path / "run")
    assert clean["command"] == "python -m adaptive.train 'log.sample_prompt=a b'"
    assert len(clean["working_folder"]["commit"]) == 40 and clean["working_folder"]["changed"] is False
    assert changed["working_folder"] == clean["working_folder"] | {"changed": True}
    assert clean["host"] and clean["processes"] == 1 and clean["devices"].endswith("cpu")
    text = (tmp_path / "run" / STARTS_FILE).read_text()
    assert "a-secret-key" not in text and len(text.splitlines()) == 2 and json.loads(text.splitlines()[0]) == clean


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    assert starts(tmp_path) == []
    (tmp_path / STARTS_FILE).write_bytes(b'{"host": "a"}\n{"host": \xff\n3\n')
    assert starts(tmp_path) == [{"host": "a"}]
