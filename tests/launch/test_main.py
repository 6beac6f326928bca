"""The launcher's command: templates, and what it refuses."""

import stat

import pytest

from adaptive.launch import __main__ as launcher
from adaptive.launch import local
from adaptive.shipped import folder


@pytest.mark.parametrize("name", launcher.TEMPLATES)
def test_a_template_is_written_once(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["--write", name]) == 0
    (written,) = tmp_path.iterdir()
    source = folder("launch") / written.name
    assert written.read_text() == source.read_text()
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    assert written.name in capsys.readouterr().out
    written.write_text("mine")
    assert launcher.main(["--write", name]) == 2
    assert "is there already" in capsys.readouterr().err and written.read_text() == "mine"


def test_every_template_can_be_written():
    files = {path.name for path in folder("launch").iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == set(launcher.TEMPLATES.values())


def test_arguments_after_the_dashes_are_those_of_each_process(capsys):
    assert local.split(["--processes", "3", "--", "--recipe", "a", "--", "b"]) == (
        ["--processes", "3"], ["--recipe", "a", "--", "b"],
    )  # fmt: skip
    assert local.split(["--processes", "3"]) == (["--processes", "3"], [])
    assert launcher.main(["--processes", "0"]) == 2
    assert "--processes: 0: must be at least 1" in capsys.readouterr().err
    assert launcher.main(["--recipe", "mor_tiny"]) == 2
    assert "'--recipe' is no option" in capsys.readouterr().err
