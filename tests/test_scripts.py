"""The set-up scripts on a small repository of their own, without a network; and what the pinned lists hold."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("cpu", "gpu", "cuda12", "tpu", "dev")

# An in-tree build backend: an editable install of the toy package that needs nothing from an index.
BACKEND = """
import os, zipfile
def get_requires_for_build_editable(config_settings=None): return []
def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "adaptive-1-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        wheel.writestr("adaptive.pth", os.getcwd())
        wheel.writestr("adaptive-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: adaptive\\nVersion: 1\\n")
        wheel.writestr("adaptive-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("adaptive-1.dist-info/RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "adaptive"
version = "1"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The scripts around a package whose adaptive.train prints its arguments, in a path with a space."""
    root = tmp_path / "a repository"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("adaptive", "requirements"):
        (root / folder).mkdir()
    for lock in LOCKS:
        (root / "requirements" / f"{lock}.txt").write_text("")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "adaptive" / "__init__.py").touch()
    (root / "adaptive" / "train.py").write_text("import os, sys; print('RUN', os.getcwd(), sys.prefix, sys.argv[1:])")
    return root


def environment(**more: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
    return keep | {"ADAPTIVE_PLATFORM": "cpu", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | more


def train(root: Path, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "scripts" / "train"), *arguments]
    env = environment(**more)
    return subprocess.run(command, cwd=cwd or root.parent, env=env, capture_output=True, text=True, timeout=300)


def test_the_first_run_installs_once_and_the_second_does_not(repository, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    command = ["bash", str(repository / "scripts" / "train"), "--recipe", "a b"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, cwd=elsewhere, env=environment(), text=True, **pipes) for _ in range(2)]
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    ran = f"RUN {elsewhere} {repository}/.venv ['--recipe', 'a b']\n"
    assert [out for out, _ in ended] == [ran, ran]
    assert sum("Making" in err for _, err in ended) == 1
    second = train(repository, "--recipe", "a b", cwd=elsewhere)
    assert (second.returncode, second.stdout, second.stderr) == (0, ran, "")

    (repository / "requirements" / "cpu.txt").write_text("# moved\n")
    third = train(repository)
    assert third.returncode == 0
    assert "Updating" in third.stderr
    assert train(repository).stderr == ""


def test_a_set_up_that_failed_or_was_killed_starts_again(repository):
    lock = repository / "requirements" / "cpu.txt"
    lock.write_text("no-such-package==1\n")
    failed = train(repository)
    assert failed.returncode == 2
    assert "RUN" not in failed.stdout
    assert "pip could not install" in failed.stderr

    lock.write_text("adaptive @ file://" + str(repository).replace(" ", "%20") + "\n")
    begun = repository / "begun"
    (repository / "backend.py").write_text(f"import time\nopen({str(begun)!r}, 'w')\ntime.sleep(60)\n")
    command = ["bash", str(repository / "scripts" / "train")]
    killed = subprocess.Popen(command, cwd=repository.parent, env=environment(), start_new_session=True)
    while not begun.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    lock.write_text("")
    (repository / "backend.py").write_text(BACKEND)
    mended = train(repository)
    assert mended.returncode == 0, mended.stderr
    assert "RUN" in mended.stdout and "Making" in mended.stderr


def test_an_environment_of_the_users_own_is_left_alone(repository):
    (repository / ".venv").mkdir()
    (repository / ".venv" / "mine").touch()
    refused = train(repository)
    assert refused.returncode == 2
    assert "was not made by this script" in refused.stderr
    assert [path.name for path in (repository / ".venv").iterdir()] == ["mine"]


def test_a_python_that_cannot_make_environments_is_told_apart(repository, tmp_path):
    (tmp_path / "ensurepip.py").write_text("raise ImportError")  # as on Debian without python3-venv
    refused = train(repository, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2
    assert "-venv\n" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (repository / ".venv").exists()


def test_a_python_that_does_not_suit_is_refused_by_name(repository, tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    named = train(repository, ADAPTIVE_PYTHON=str(old))
    assert named.returncode == 2
    assert str(old) in named.stderr
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    (tools / "python3").symlink_to(old)
    none = train(repository, PATH=str(tools))
    assert none.returncode == 2
    assert "No Python 3.11 to 3.14 on PATH (python3 is: Python 3.9.2)" in none.stderr


@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("exit 9", "cpu"),  # installed, but no GPU answers
        ("echo 580.65.06", "gpu"),
        ("echo 550.54.15", "cuda12"),
        ("echo 470.256.02", "driver is 470.256.02.*need 525"),
        ("echo NVIDIA-SMI has failed", "cpu"),
    ],
)
def test_the_platform_found_decides_what_is_installed(tmp_path, smi, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    program = "import bootstrap; print(bootstrap.find_platform())"
    env = environment(ADAPTIVE_PLATFORM="", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(ROOT / "scripts"))
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert re.search(expected, found.stdout + found.stderr)
    assert (found.returncode == 0) == (expected in ("cpu", "gpu", "cuda12"))


def pins(lock: str) -> dict[tuple[str, str], str]:
    """(package, marker) -> version, for every line of a list."""
    found = {}
    for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            matched = re.fullmatch(r"([a-z0-9-]+)==(\S+)(?: ; (.+))?", line)
            assert matched, f"{lock}.txt: not a pin: {line}"
            found[matched[1], matched[3] or ""] = matched[2]
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_lists_are_pinned_and_agree(lock):
    mine, cpu, dev = pins(lock), pins("cpu"), pins("dev")
    assert {key: mine.get(key) for key in cpu} == cpu
    assert {key: mine[key] for key in dev if key in mine} == {key: dev[key] for key in dev if key in mine}
    assert "://" not in (ROOT / "requirements" / f"{lock}.txt").read_text()


def test_lists_hold_what_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    of_platform = {name: [*optional[name], *optional["hf"], *optional["gcs"]] for name in ("gpu", "cuda12", "tpu")}
    for lock, wanted in {"cpu": [], "dev": optional["dev"], **of_platform}.items():
        held = {name for name, _ in pins(lock)}
        for requirement in [*project["dependencies"], *wanted]:
            assert re.match(r"[a-z0-9-]+", requirement)[0] in held, f"./scripts/lock: {lock}.txt lacks {requirement}"


def test_a_cpu_installation_is_small():
    held = {name for name, _ in pins("cpu")}
    assert not [
        name for name in held if re.match("nvidia|jax-cuda|libtpu|torch|triton|wandb|datasets|pyarrow|pandas", name)
    ]
    assert len(held) < 40
