"""Every test runs on eight emulated CPU devices, with compilations kept between runs."""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "adaptive-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Threads of XLA's CPU client. With one per device, independent collectives of one device can hold two of them, and the
# device that finds none never arrives.
os.environ.setdefault("NPROC", "32")

MOST_MAPPINGS = 20_000  # Linux allows a process 65,530; a compiled program takes about a dozen while it lives
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Forgets compiled programs when there are many: out of mappings, XLA crashes the process."""
    yield
    if "jax" in sys.modules and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()
