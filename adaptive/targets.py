"""Machines that programs can be compiled for without having one: described to XLA's own compilers."""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from adaptive.errors import UserError
from adaptive.peaks import DEVICES
from adaptive.settings import nearest

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
    inside      bytes/s that a device receives over the links of its slice (TPU) or node (GPU), by the data sheet: half
                of what both directions carry
    between     the same over the network between slices or nodes
    counted     what the number in a name counts, as those who rent such machines write it
    units       how many of those a device of jax is
    """

    kind: str
    package: tuple[str, str]
    topologies: dict[int, str]
    bandwidth: float
    inside: float
    between: float
    counted: str = "chips"
    units: int = 1

    @property
    def memory(self) -> float:
        """Bytes of a device."""
        return DEVICES[self.kind].memory


def _shapes(name: str, per_chip: int, *shapes: str) -> dict[int, str]:
    return {per_chip * math.prod(map(int, shape.split("x"))): f"{name}:{shape}" for shape in shapes}


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_NODE = 8  # GPUs of one
_LIBTPU = ("libtpu", "libtpu")
_CUDA = ("jax_plugins.xla_cuda13", "jax-cuda13-plugin")
_NODES = {4: "1x1x4", 8: "1x1x8", 16: "1x2x8", 32: "1x4x8", 64: "1x8x8"}
# Network between slices per chip: 6.4 Tbit/s over the 256 chips of a v5e pod, 50, 100 and 100 Gbit/s a chip; of an H200
# one port of 400 Gbit/s each, as DGX H200 has.
TARGETS = {
    "v5e": Target("TPU v5 lite", _LIBTPU, _shapes("v5e", 1, *_FLAT), 0.82e12, 200e9, 3.1e9),
    "v5p": Target("TPU v5", _LIBTPU, _shapes("v5p", 1, *_DEEP), 2.765e12, 600e9, 6.25e9, "cores", 2),
    "v6e": Target("TPU v6 lite", _LIBTPU, _shapes("v6e", 1, *_FLAT), 1.64e12, 400e9, 12.5e9),
    "v7x": Target("TPU7x", _LIBTPU, _shapes("tpu7x", 2, "2x1x1", *_DEEP), 3.7e12, 300e9, 6.25e9, "cores"),
    "h200": Target("NVIDIA H200", _CUDA, _NODES, 4.8e12, 450e9, 50e9, "GPUs"),
}

# Where scripts/bootstrap.py puts the compilers: not on the path, where jax would look for the machines they are for.
COMPILERS = Path(sys.prefix) / "compilers"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    target   key of TARGETS, or "cpu": emulated devices of this machine
    devices  of jax, in all slices together
    slices   groups of devices that a slower network joins: slices of TPUs, nodes of GPUs
    """

    target: str
    devices: int
    slices: int = 1

    @property
    def name(self) -> str:
        """As `topology` reads it."""
        if self.target in ("cpu", "h200"):
            return f"{self.target}-{self.devices}"
        one = self.devices // self.slices * TARGETS[self.target].units
        return f"{self.target}-{one}" + (f"x{self.slices}" if self.slices > 1 else "")

    def __str__(self) -> str:
        if self.target == "cpu":
            return f"{self.name}: {self.devices} emulated devices of this machine"
        known, groups = TARGETS[self.target], "nodes" if self.target == "h200" else "slices"
        chips = self.devices if known.units == 2 else self.devices // 2 if self.target == "v7x" else 0
        also = f" ({chips} chips)" if chips else ""
        joined = f" in {self.slices} {groups}" if self.slices > 1 else ""
        return f"{self.name}: {self.devices} x {known.kind}{also}{joined}"


_NAME = re.compile(r"([a-z]\w*?)-(\d{1,6})(?:x(\d{1,4}))?")
MOST_EMULATED = 512


def topology(name: str, slices: int | None = None) -> Topology:
    """The topology of a name: v5e-256, v5p-128, v6e-256x2, v7x-64, h200-16, cpu-8.

    slices  of TPUs; None: as the name says, else one
    Raises UserError for names that mean nothing, with those that do.
    """
    found = _NAME.fullmatch(name)
    kinds = [*TARGETS, "cpu"]
    if not found or found[1] not in kinds:
        head = name.partition("-")[0]
        near = nearest(head, kinds, 1) if head else []
        hint = f"; did you mean {near[0]}-N?" if near and near[0] != head else ""
        raise UserError(f"--topology={name} is none that is known{hint}; --topology list names all")
    target, number = found[1], int(found[2])
    count = int(found[3]) if found[3] else slices or 1
    if slices is not None and slices != count:
        raise UserError(f"--slices={slices}, but {name} has {count}; say it once")
    if count < 1:
        raise UserError(f"--topology={name}: there is at least one slice")
    if count > 1 and target in ("cpu", "h200"):
        why = "nodes of eight are counted together: h200-16" if target == "h200" else "use mesh.slices"
        raise UserError(f"--topology={name}: only TPUs have slices; {why}")
    if target == "cpu":
        if not 1 <= number <= MOST_EMULATED:
            raise UserError(f"--topology={name}: from cpu-1 to cpu-{MOST_EMULATED}")
        return Topology("cpu", number)
    known = TARGETS[target]
    sizes = {devices * known.units: devices for devices in known.topologies}
    if number not in sizes:
        raise UserError(
            f"--topology={name}: {target} has {', '.join(f'{target}-{size}' for size in sizes)} ({known.counted})"
        )
    devices = sizes[number]
    return Topology(target, devices * count, max(1, devices // _NODE) if target == "h200" else count)


def topology_lines() -> list[str]:
    """What `topology` reads, in words."""
    lines = []
    for target, known in TARGETS.items():
        sizes = " ".join(f"{target}-{devices * known.units}" for devices in known.topologies)
        each = {"v5p": "cores, two of a chip, which are one device", "v7x": "cores, two of a chip, each a device"}
        nodes = f", nodes of {_NODE}" if target == "h200" else ""
        lines.append(f"{known.kind}, {each.get(target, known.counted)}{nodes}: {sizes}")
    return [
        *lines,
        "several TPU slices: v5e-256x2, or --slices 2",
        f"emulated devices of this machine: cpu-1 to cpu-{MOST_EMULATED}",
    ]


def environment(emulated: int = 0) -> dict[str, str]:
    """The environment of a process that compiles for targets: it finds the compilers and takes this machine for no
    more than a CPU, of so many emulated devices (0: one)."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(COMPILERS)])
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    if emulated:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={emulated}"
    return env


def can_compile(name: str) -> bool:
    """Whether a process with `environment()` could compile for a target."""
    return name == "cpu" or installed(name) or (COMPILERS / TARGETS[name].package[0].replace(".", "/")).exists()


def refuse_without_compiler(name: str) -> None:
    """Raises UserError where a process with `environment()` could not compile for a target, with what to install."""
    if not can_compile(name):
        package = TARGETS[name].package[1]
        raise UserError(
            f"compiling for {name} needs {package}, of the version that jax names: ./scripts/test installs it, or "
            f"pip install --no-deps --target {COMPILERS} {package}==VERSION"
        )


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology, in the compiler's order, or as many of the least that has enough. Raises UserError
    where they cannot be had."""
    import jax
    from jax.experimental.topologies import get_topology_desc

    name = topology.target
    if name == "cpu":
        return list(jax.devices("cpu"))[: topology.devices]
    target = TARGETS[name]
    if not installed(name):
        raise UserError(f"compiling for {name} needs the package {target.package[1]}, of the version that jax names")
    slices = 1 if name == "h200" else topology.slices
    shape = target.topologies[min(size for size in target.topologies if size >= topology.devices // slices)]
    if name == "h200":
        found = get_topology_desc("", "cuda", target_config=_H200, topology=shape).devices
    else:
        chips = [int(side) for side in shape.partition(":")[2].split("x")]
        # A TPU's host has four chips; where it is to have fewer, the compiler wants to be told.
        more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if math.prod(chips) < 4:
            more["chips_per_host_bounds"] = (*chips, 1)[:3]
        found = get_topology_desc(shape, platform="tpu", **more).devices
    return list(found)[: topology.devices]


def installed(name: str) -> bool:
    """Whether this environment can compile for a target."""
    try:
        return importlib.util.find_spec(TARGETS[name].package[0]) is not None
    except ModuleNotFoundError:
        return False
