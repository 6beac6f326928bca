"""What kernels cost, told to the compiler, which knows nothing of them but their shapes and takes them for free."""

from typing import Any, Protocol

from jax.experimental import pallas as pl


class Sized(Protocol):
    """What has a shape and a dtype: an array, traced or not, or a description of one."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> Any: ...


def cost(flops: int, exponentials: int, *arrays: Sized) -> pl.CostEstimate:
    """Of a kernel that reads or writes each array once."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved)
