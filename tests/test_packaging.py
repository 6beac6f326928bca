"""What an installed package holds: all that a checkout has, under names that meet no project's own."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from adaptive import shipped

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def given(monkeypatch):
    """What setup.py says."""
    setuptools = pytest.importorskip("setuptools")
    found: dict = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_every_module_is_in_a_package(given):
    folders = {given["package_dir"].get(name, name.replace(".", "/")) for name in given["packages"]}
    held = {str(path.parent.relative_to(ROOT)) for room in ("adaptive", "kernels_pallas", "recipes", "launch")
            for path in (ROOT / room).rglob("*.py")}  # fmt: skip
    assert folders == held
    assert {name.partition(".")[0] for name in given["packages"]} == {"adaptive", "kernels_pallas"}


def test_folders_are_found_where_setup_puts_them(given, tmp_path, monkeypatch):
    for name, source in given["package_dir"].items():
        assert shipped.folder(source) == ROOT / source
        (tmp_path / name.removeprefix("adaptive.")).mkdir()
        (tmp_path / source).mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    assert shipped.folder("recipes") == tmp_path / "_recipes" and shipped.folder("launch") == tmp_path / "_launch"


def test_files_that_are_no_modules_are_named(given):
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for name in given["packages"]:
        at = ROOT / given["package_dir"].get(name, name.replace(".", "/"))
        top, below = (name, "") if name in data else (name.partition(".")[0], "/".join([*name.split(".")[1:], ""]))
        for path in at.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                patterns = data.get(top, [])
                assert any(Path(below + path.name).match(pattern) for pattern in patterns), path


def test_the_name_is_the_one_that_messages_give():
    name = PROJECT["project"]["name"]
    assert name == "adaptive-lm" and PROJECT["project"]["scripts"] == {"adaptive": "adaptive.__main__:enter"}
    extras = set(PROJECT["project"]["optional-dependencies"])
    for path in [*(ROOT / "adaptive").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for package, extra in re.findall(r"pip install '([\w-]+)\[(\w+|\{\w+\})\]", path.read_text(encoding="utf-8")):
            assert package == name and (extra in extras or extra.startswith("{")), path


def test_the_source_distribution_is_complete():
    lines = (ROOT / "MANIFEST.in").read_text().split()
    kept = {path.name for path in ROOT.iterdir() if path.is_dir()} & {
        ".ci", "docs", "launch", "recipes", "requirements", "scripts", "tests",
    }  # fmt: skip
    assert len(kept) == 7 and kept <= set(lines) and "Containerfile" in lines
