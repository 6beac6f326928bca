"""Memory that a CPU's programs free stays with the process, unless the user says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from adaptive.parallel import backend

FAULTS = """
import resource, sys
import numpy as np
from adaptive.parallel.backend import keep_memory

kept = keep_memory()
np.ones(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**26)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    env |= {"JAX_PLATFORMS": "cpu", **environment}
    kept, count = subprocess.check_output([sys.executable, "-c", FAULTS], env=env, text=True).split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_is_not_fetched_again():
    assert faults() == (True, pytest.approx(0, abs=100))
    kept, count = faults(MALLOC_ARENA_MAX="8")
    assert not kept and count > 1000


def test_machines_with_accelerators_are_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend.importlib.metadata, "entry_points", lambda group: ["cuda"])
    assert not backend.keep_memory()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not backend.keep_memory()
