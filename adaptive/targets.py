"""Machines that programs can be compiled for without having one: described to XLA's own compilers."""

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

from adaptive.errors import UserError
from adaptive.peaks import DEVICES

# Fields of openxla/xla's stream_executor device description, with NVIDIA's published figures for the H200.
_H200 = """
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


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    kind        what jax calls such a device
    package     the module that compiles for it, and the name that it is installed by
    topologies  what the compiler calls so many of its devices
    bandwidth   bytes/s of its memory, by the data sheet
    """

    kind: str
    package: tuple[str, str]
    topologies: dict[int, str]
    bandwidth: float

    @property
    def memory(self) -> float:
        """Bytes of a device."""
        return DEVICES[self.kind].memory


_LIBTPU = ("libtpu", "libtpu")
TARGETS = {
    "v5e": Target("TPU v5 lite", _LIBTPU, {4: "v5e:2x2", 8: "v5e:2x4"}, 0.82e12),
    "v5p": Target("TPU v5", _LIBTPU, {4: "v5p:2x2x1", 8: "v5p:2x2x2"}, 2.765e12),
    "v6e": Target("TPU v6 lite", _LIBTPU, {4: "v6e:2x2", 8: "v6e:2x4"}, 1.64e12),
    "v7x": Target("TPU7x", _LIBTPU, {4: "tpu7x:2x1x1", 8: "tpu7x:2x2x1"}, 3.7e12),
    "h200": Target("NVIDIA H200", ("jax_plugins.xla_cuda13", "jax-cuda13-plugin"), {4: "1x1x4", 8: "1x1x8"}, 4.8e12),
}

# Where scripts/bootstrap.py puts the compilers: not on the path, where jax would look for the machines they are for.
COMPILERS = Path(sys.prefix) / "compilers"


def environment() -> dict[str, str]:
    """The environment of a process that compiles for targets: it finds the compilers and takes this machine for no
    more than a CPU."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(COMPILERS)])
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    return env


def can_compile(name: str) -> bool:
    """Whether a process with `environment()` could compile for a target."""
    return installed(name) or (COMPILERS / TARGETS[name].package[0].replace(".", "/")).exists()


def devices(name: str, count: int) -> list[Any]:
    """As many devices of a target, which is none of this machine's. Raises UserError where they cannot be had."""
    from jax.experimental.topologies import get_topology_desc

    target = TARGETS[name]
    if not installed(name):
        raise UserError(f"compiling for {name} needs the package {target.package[1]}, of the version that jax names")
    topology = target.topologies[min(size for size in target.topologies if size >= count)]
    if name == "h200":
        found = get_topology_desc("", "cuda", target_config=_H200, topology=topology).devices
    else:
        chips = [int(side) for side in topology.partition(":")[2].split("x")]
        # A TPU's host has four chips; where it is to have fewer, the compiler wants to be told.
        fewer = {"chips_per_host_bounds": tuple(chips)} if math.prod(chips) < 4 else {}
        found = get_topology_desc(topology, platform="tpu", **fewer).devices
    return list(found)[:count]


def installed(name: str) -> bool:
    """Whether this environment can compile for a target."""
    try:
        return importlib.util.find_spec(TARGETS[name].package[0]) is not None
    except ModuleNotFoundError:
        return False
