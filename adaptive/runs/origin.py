"""How a run came about: for every start a line with the command, the versions, the machine and the state of the code.

    {"time": "2026-11-29T12:00:00+00:00", "host": "name", "command": "python -m adaptive.train --recipe mor_tiny",
     "adaptive": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "devices": "8 x cpu", "processes": 1,
     "package": {"commit": "0123...", "changed": false}, "working_folder": null}

package, working_folder: the git repository of the package's code and of where the command ran; null outside of one,
and the second where it is the first. Nothing comes from environment variables.
"""

import contextlib
import datetime
import json
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import adaptive

STARTS_FILE = "starts.jsonl"
_GIT_S = 5.0  # seconds for an answer of git


def record_start(workdir: Path) -> None:
    """Adds this start to `starts.jsonl` of the run's folder; what cannot be written there stops no run."""
    with contextlib.suppress(OSError), (workdir / STARTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(this_start()) + "\n")


def starts(workdir: Path) -> list[dict[str, Any]]:
    """Every start of the run, oldest first; lines that cannot be read are left out."""
    try:
        lines = (workdir / STARTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def this_start() -> dict[str, Any]:
    checkout = Path(adaptive.__file__).parents[1]
    package = repository(checkout) if (checkout / ".git").exists() else None  # not of a project that installed it
    here = repository(Path.cwd())
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": shlex.join(sys.orig_argv),
        "adaptive": adaptive.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "package": package,
        "working_folder": None if here == package else here,
    }


def repository(folder: Path) -> dict[str, Any] | None:
    """{"commit": 40 hex digits, "changed": whether files that git tracks differ from it} of the git repository around
    the folder; None where there is none, or no git."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
