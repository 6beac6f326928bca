"""Compiling for machines that are not here: devices of a TPU or GPU target, described to XLA's own compilers.

Needs the package `PACKAGES` names for the target, of the version that belongs to jax's. A program is compiled in a
process of its own: the file of the test runs as a script, with the target's name as its argument.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

PACKAGES = {"v5e": "libtpu", "h200": "jax_cuda13_plugin"}

# Fields of openxla/xla's stream_executor device description, with NVIDIA's published figures for the H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def devices(target: str) -> list:
    """Four devices of the target, to compile for."""
    from jax.experimental.topologies import get_topology_desc

    if target == "h200":
        return get_topology_desc("", "cuda", target_config=H200, topology="1x1x4").devices
    return get_topology_desc(f"{target}:2x2", platform="tpu").devices


def run(script: str, target: str) -> str:
    """What the script prints for the target. Skips the test where the target's compiler is not installed."""
    if importlib.util.find_spec(PACKAGES[target]) is None:
        pytest.skip(f"compiling for {target} needs {PACKAGES[target]}, which is not installed")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, script, target], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
