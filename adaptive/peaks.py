"""Dense matmul peaks and memory of accelerators, by the exact name jax gives the device."""

from typing import NamedTuple


class Peak(NamedTuple):
    """flops  FLOP/s of one device, dense (no structured sparsity); None where it is not known
    why    where the number is from, or why there is none"""

    flops: float | None
    why: str


class Device(NamedTuple):
    """What one device has, from the vendor's data sheet; memory of TPUs as their compiler says.

    flops   bfloat16 FLOP/s of dense matmuls with float32 accumulation
    memory  bytes
    """

    flops: float
    memory: float


# By `device_kind`. "TPU v5" is v5p, the "lite" kinds are v5e and v6e, "TPU7x" is one of two devices of a chip, and a
# "TPU v4" device is taken to be a whole one.
DEVICES = {
    "TPU v4": Device(275e12, 30.5 * 2**30),
    "TPU v5 lite": Device(197e12, 15.75 * 2**30),
    "TPU v5": Device(459e12, 95.74 * 2**30),
    "TPU v6 lite": Device(918e12, 31.25 * 2**30),
    "TPU7x": Device(1153.5e12, 94.75 * 2**30),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80e9),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 40e9),
    "NVIDIA A100 80GB PCIe": Device(312e12, 80e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9),
    "NVIDIA H100 PCIe": Device(756e12, 80e9),
    "NVIDIA H200": Device(989e12, 141e9),
    "NVIDIA B200": Device(2250e12, 180e9),
}
# Of a GPU's memory as much as jax takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75


def memory_of(device_kind: str) -> int | None:
    """Bytes of one device that programs can have; None where they are not on record (of CPUs they are not)."""
    if device_kind not in DEVICES:
        return None
    memory = DEVICES[device_kind].memory
    return int(memory * GPU_SHARE if device_kind.startswith("NVIDIA") else memory)


def peak_of(device_kind: str, dtype: str) -> Peak:
    """The matmul peak of one device.

    device_kind  as `jax.Device.device_kind` says; must match exactly: a near name can be a part half as fast
    dtype        "bfloat16" or "float32", what matmuls take in
    """
    if dtype != "bfloat16":
        return Peak(None, f"{dtype} matmuls run in a number of passes that depends on their precision setting")
    if device_kind not in DEVICES:
        return Peak(None, f"no peak is on record for a device called '{device_kind}' in {dtype}")
    return Peak(DEVICES[device_kind].flops, f"data sheet of {device_kind}, dense {dtype}")
