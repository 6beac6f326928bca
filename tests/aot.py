"""Compiling for machines that are not here, in tests.

A program is compiled in a process of its own: the file of the test runs as a script, with the target's name as its
argument. The compilers are those of `.venv/compilers` (scripts/bootstrap.py) or of the environment itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive import targets

COMPILERS = Path(sys.prefix) / "compilers"
PACKAGES = ("v5e", "h200")  # what every run compiles for; the others are slow, and single kernels behave alike on them
if os.environ.get("ADAPTIVE_AOT") == "all":
    PACKAGES = tuple(targets.TARGETS)
KERNEL = {name: "__gpu$xla.gpu.triton" if name == "h200" else "tpu_custom_call" for name in targets.TARGETS}


def devices(target: str) -> list:
    """Four devices of the target, to compile for."""
    return targets.devices(target, 4)


def run(script: str, target: str) -> str:
    """What the script prints for the target. Skips the test where the target's compiler is not installed."""
    if not targets.installed(target) and not COMPILERS.is_dir():
        pytest.skip(f"compiling for {target} needs {targets.TARGETS[target].package[1]}, which is not installed")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(COMPILERS)])
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, script, target], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
