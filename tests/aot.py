"""Compiling for machines that are not here, in tests.

A program is compiled in a process of its own: the file of the test runs as a script, with the target's name as its
argument. The compilers are those of `.venv/compilers` (scripts/bootstrap.py) or of the environment itself.
"""

import os
import subprocess
import sys

import pytest

from adaptive import targets

ALL = os.environ.get("ADAPTIVE_AOT") == "all"  # every target and case
PACKAGES = ("v5e", "h200")  # what every run compiles for; the others are slow, and single kernels behave alike on them
if ALL:
    PACKAGES = tuple(targets.TARGETS)
KERNEL = {name: "__gpu$xla.gpu.triton" if name == "h200" else "tpu_custom_call" for name in targets.TARGETS}


def devices(target: str) -> list:
    """Four devices of the target, to compile for."""
    return targets.devices_of(targets.Topology(target, 4))


def run(script: str, target: str, *more: str) -> str:
    """What the script prints for the target and `more`. Skips the test where the target's compiler is not installed."""
    if not targets.can_compile(target):
        pytest.skip(f"compiling for {target} needs {targets.TARGETS[target].package[1]}, which is not installed")
    command, env = [sys.executable, script, target, *more], targets.environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
