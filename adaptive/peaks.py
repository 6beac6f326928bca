"""Dense matmul peaks and memory of accelerators, by the exact name jax gives the device."""

from typing import NamedTuple


class Peak(NamedTuple):
    """flops  FLOP/s of one device, dense (no structured sparsity); None where it is not known
    why    where the number is from, or why there is none"""

    flops: float | None
    why: str


# `device_kind` -> bfloat16 FLOP/s with float32 accumulation, from the vendors' data sheets. "TPU v5" is v5p, the "lite"
# kinds are v5e and v6e, and "TPU7x" is one of the two devices of a chip. A "TPU v4" device is taken to be a whole chip.
_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

# `device_kind` -> bytes that programs can have: of TPUs as their compiler says, of GPUs three quarters of the data
# sheet's, as much as jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_MEMORY = {
    "TPU v4": 30.5 * 2**30,
    "TPU v5 lite": 15.75 * 2**30,
    "TPU v5": 95.74 * 2**30,
    "TPU v6 lite": 31.25 * 2**30,
    "TPU7x": 94.75 * 2**30,
    "NVIDIA A100-SXM4-40GB": 0.75 * 40e9,
    "NVIDIA A100-SXM4-80GB": 0.75 * 80e9,
    "NVIDIA A100-PCIE-40GB": 0.75 * 40e9,
    "NVIDIA A100 80GB PCIe": 0.75 * 80e9,
    "NVIDIA H100 80GB HBM3": 0.75 * 80e9,
    "NVIDIA H100 PCIe": 0.75 * 80e9,
    "NVIDIA H200": 0.75 * 141e9,
    "NVIDIA B200": 0.75 * 180e9,
}


def memory_of(device_kind: str) -> int | None:
    """Bytes of one device that programs can have; None where they are not on record (of CPUs they are not)."""
    found = _MEMORY.get(device_kind)
    return None if found is None else int(found)


def peak_of(device_kind: str, dtype: str) -> Peak:
    """The matmul peak of one device.

    device_kind  as `jax.Device.device_kind` says; must match exactly: a near name can be a part half as fast
    dtype        "bfloat16" or "float32", what matmuls take in
    """
    if dtype != "bfloat16":
        return Peak(None, f"{dtype} matmuls run in a number of passes that depends on their precision setting")
    if device_kind not in _BFLOAT16:
        return Peak(None, f"no peak is on record for a device called '{device_kind}' in {dtype}")
    return Peak(_BFLOAT16[device_kind], f"data sheet of {device_kind}, dense {dtype}")
