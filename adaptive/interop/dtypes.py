"""Which numbers weights are read in."""

from typing import Any

FLOATS = ("float16", "bfloat16", "float32", "float64")


def dtype_name(value: Any) -> str:
    """The dtype of an array of numpy, JAX or PyTorch."""
    return getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))


def not_a_weight(name: str, dtype: str) -> str:
    """What is wrong with a tensor of another dtype."""
    return (
        f"{name} is {dtype}; weights are read in {', '.join(FLOATS[:-1])} and {FLOATS[-1]}, quantised ones are not: "
        "give them as they were before quantisation, or multiplied out"
    )
