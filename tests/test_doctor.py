"""Version checks: what passes, what is refused, and that the ranges are stated once."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from adaptive import doctor
from adaptive import versions as used
from adaptive.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(monkeypatch):
    """The versions that the check sees; all good to begin with."""
    found = {wanted.package: wanted.low for wanted in used.TESTED} | {"jaxlib": "0.10.2"}
    monkeypatch.setattr(used, "installed", lambda package: found.get(package, ""))
    return found


def test_good_versions_are_listed_in_one_line(versions):
    assert used.check_versions().count("\n") == 0
    assert "jax 0.10.2" in used.check_versions()


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("jax", "0.9.9", "jax is 0.9.9, tested are 0.10.2"),
        ("flax", "", "flax is not installed"),
        ("jaxlib", "0.11.0", "jaxlib is 0.11.0 but jax is 0.10.2"),
        ("jaxlib", "", "jaxlib is absent"),
        ("jax-cuda13-plugin", "0.10.1", "jax-cuda13-plugin is 0.10.1 but jaxlib is 0.10.2"),
    ],
)
def test_versions_that_cannot_work_are_refused_with_the_command_that_mends_them(versions, package, version, says):
    versions[package] = version
    with pytest.raises(UserError, match=says) as caught:
        used.check_versions()
    assert "pip install -r requirements/" in str(caught.value)


def test_a_newer_version_is_a_warning(versions):
    versions["optax"] = "0.3.1"
    assert "warning: optax is 0.3.1" in used.check_versions()


def test_versions_compare_by_number():
    assert used.order("0.9.12") < used.order("0.10.2rc1") < used.order("0.10.10")


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in used.TESTED:
        assert f"{wanted.package}>={wanted.low},<{wanted.below}" in project["dependencies"]
    assert project["requires-python"] == f">={used.PYTHON.low}"
    assert {extra for extra, _ in doctor.OPTIONAL.values()} <= set(project["optional-dependencies"])


def test_the_check_imports_nothing_heavy():
    program = "import sys; from adaptive.doctor import check_versions; check_versions(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"jax", "numpy", "flax"} & set(loaded.stdout.split())
