"""Two real processes over loopback: one cache of programs, one who comes too late."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive.errors import ClusterError
from adaptive.parallel.cluster import start_limit

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, sys, time
import jax, jax.monitoring
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from adaptive.errors import ClusterError
from adaptive.parallel import cluster
from adaptive.runs.platform import keep_compilations

job = cluster.join(say=lambda line: None)
heard = []
jax.monitoring.register_event_listener(lambda event, **about: heard.append(event))
keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
total = jax.jit(lambda x: (x * 3).sum(), out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
shape = jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)
compiled = total.lower(shape).compile()
hits = sum(event.endswith("cache_hits") for event in heard)
print(f"compiled {sum(event.endswith('compile_requests_use_cache') for event in heard) - hits}", flush=True)
mine = np.arange(2, dtype=np.float32) + 2 * job.index
cluster.meet("the program is compiled")
print("sum", float(compiled(jax.make_array_from_process_local_data(sharding, mine))), flush=True)
os.environ["ADAPTIVE_START_LIMIT"] = "1"
time.sleep(3 * job.index)
try:
    cluster.meet("something else")
except ClusterError as error:
    print(error, flush=True)
os._exit(0)
"""


def run(cache: Path) -> list[str]:
    """The output of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "ADAPTIVE_COORDINATOR": f"127.0.0.1:{port}", "ADAPTIVE_PROCESSES": "2", "ADAPTIVE_HOSTS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=env | {"ADAPTIVE_PROCESS": str(index)}, cwd=cache, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_whoever_is_missing_is_named(tmp_path):
    """A second start, and one who is lost, are in tests/training/test_several_processes.py."""
    host = socket.gethostname()
    first, other = run(tmp_path)
    assert "compiled 1" in first and "sum 18.0" in first and "sum 18.0" in other
    assert f"something else: process 1 on {host} did not come within 1 s of the others (ADAPTIVE_START_LIMIT" in first


@pytest.mark.parametrize("text", ["soon", "0", "-5", "inf", "nan"])
def test_a_start_limit_that_is_none_is_refused(text):
    assert start_limit({}) == 600 and start_limit({"ADAPTIVE_START_LIMIT": "45"}) == 45
    with pytest.raises(ClusterError, match=f"ADAPTIVE_START_LIMIT={text}: expected seconds"):
        start_limit({"ADAPTIVE_START_LIMIT": text})
