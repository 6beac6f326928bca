"""The launcher's command: targets, files, and what it refuses."""

import sys

import pytest

from adaptive.launch import __main__ as launcher
from adaptive.launch import local
from adaptive.launch.job import OPTIONS

TRAINING = ["--", "--recipe", "mor_tiny", "--workdir", "gs://bucket/run"]
OF_TARGET = {
    "slurm": ["--nodes", "2", "--gpus_per_node", "4"],
    "gke": ["--accelerator", "v5e-16", "--image", "here/adaptive:1"],
    "tpu": ["--accelerator", "v5e-16", "--zone", "us-west4-a"],
    "skypilot": ["--accelerator", "h200"],
}


@pytest.mark.parametrize("target", launcher.TARGETS)
def test_a_target_is_printed_written_and_started(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [target, *OF_TARGET[target], "--name", "one"]
    assert launcher.main([*words, *TRAINING]) == 0
    text = capsys.readouterr().out
    assert "--recipe" in text and not [*tmp_path.iterdir()]
    assert launcher.main([*words, "--write", *TRAINING]) == 0
    (written,) = tmp_path.iterdir()
    assert written.read_text() == text and written.name in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.main([*words, "--start", *TRAINING]) == 2
    program, *rest = launcher.commands_of(launcher.Rendered(written.name, "", start_of(target)))[0]
    assert f"{program} is not installed here" in capsys.readouterr().err and written.name in rest
    (tmp_path / program).write_text(
        f'#!{sys.executable}\nimport sys\nopen("said", "w").write(" ".join(sys.argv[1:]))\nexit(7)\n'
    )
    (tmp_path / program).chmod(0o755)
    assert launcher.main([*words, "--start", *TRAINING]) == 7
    assert (tmp_path / "said").read_text() == " ".join(rest)
    written.write_text("mine")
    assert launcher.main([*words, "--write", *TRAINING]) == 2
    assert "is there already" in capsys.readouterr().err and written.read_text() == "mine"


def start_of(target):
    return {
        "slurm": (("sbatch", "FILE"),),
        "gke": (("kubectl", "apply", "-f", "FILE"),),
        "tpu": (("bash", "FILE", "up"),),
        "skypilot": (("sky", "jobs", "launch", "--yes", "FILE"),),
    }[target]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["slrum"], "did you mean slurm?"),
        (["slurm", "--image", "x", *TRAINING], "--image: slurm does not use it (it reads --env, --folder"),
        (["slurm", "--name", "Mine", *TRAINING], "--name Mine: expected letters"),
        (["slurm", "--env", "A", *TRAINING], "--env A: expected NAME=VALUE"),
        (["slurm", "--folder", "/a\nb", *TRAINING], "--folder: '/a\\nb' holds characters"),
        (["slurm", *TRAINING, "a=\0"], "after --: 'a=\\x00' holds characters"),
        (["slurm", "--process_per", "core", *TRAINING], "--process_per core: expected node or gpu"),
        (["slurm", "--nodes", "0", *TRAINING], "--nodes: 0: must be at least 1"),
        (["slurm", "--", "--recipe", "mor_tiny"], "none is given: after --, say a folder that all machines see"),
        (["slurm", "--", "--workdir", "/x"], "which recipe?"),
        (["slurm", *TRAINING, "train.stepz=1"], "train.steps"),  # as training itself would, after the queue
        (["slurm", *TRAINING, "mesh.fsdp=3"], "does not fit 8 devices"),
        (["tpu", *OF_TARGET["tpu"], "--slices=2", *TRAINING, "mesh.fsdp=32"], "say mesh.slices=2 after --"),
        (["--write", "slurm"], "adaptive launch slurm --write"),
        (["--processes", "0"], "--processes: 0: must be at least 1"),
        (["--recipe", "mor_tiny"], "'--recipe' is no option"),
    ],
)
def test_what_cannot_be_is_refused(words, why, capsys):
    assert launcher.main(words) == 2
    assert why in capsys.readouterr().err


def test_a_recipe_of_the_cluster_alone_is_left_to_it(capsys):
    assert launcher.main(["slurm", "--", "--recipe", "/shared/mine.py", "--workdir=/shared/one", "any.thing=1"]) == 0
    assert "--recipe /shared/mine.py" in capsys.readouterr().out


def test_every_option_is_read_by_a_target_and_every_target_reads_options():
    modules = [__import__(f"adaptive.launch.{target}", fromlist=["READS"]) for target in launcher.TARGETS]
    assert set().union(*(module.READS for module in modules)) == set(OPTIONS)


def test_arguments_after_the_dashes_are_those_of_each_process():
    assert local.split(["--processes", "3", "--", "--recipe", "a", "--", "b"]) == (
        ["--processes", "3"], ["--recipe", "a", "--", "b"],
    )  # fmt: skip
    assert local.split(["--processes", "3"]) == (["--processes", "3"], [])


def test_local_is_the_target_where_none_is_said(monkeypatch):
    asked = []
    monkeypatch.setattr(launcher, "launch", lambda given, rest: asked.append((given.processes, rest)) or 0)
    assert launcher.main(["--processes", "3", "--", "--recipe", "a"]) == 0
    assert launcher.main(["local", "--processes", "3", "--", "--recipe", "a"]) == 0
    assert asked == [(3, ["--recipe", "a"])] * 2
