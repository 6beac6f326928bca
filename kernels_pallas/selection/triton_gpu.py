"""Radix selection as one kernel on an NVIDIA GPU, by jax-triton: Triton has the histogram that Pallas has not.

A program keeps a row in registers: four passes, each a histogram of 256 digits, where XLA makes two dozen kernels. It
needs the extra `triton`, which imports only beside JAX's CUDA plugin. The call cannot be divided over devices, nor is
it differentiated or mapped: positions have no gradient. Interpreted it gives what a sort gives, and it compiles ahead
of time for an H200; on a GPU it has not run.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

MOST = 16384  # positions of a row that a program keeps


def serves() -> str:
    """Why programs of this process do not use the kernel; "" if they do."""
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return "one kernel by jax-triton with the extra triton"
    if jax.default_backend() != "gpu" or jax.device_count() != 1:
        return "one kernel by jax-triton on a single GPU"
    return ""


def top_positions(scores: jax.Array, count: int, capability: int | None = None) -> jax.Array:
    """scores f32[rows, n], n at most MOST -> i32[rows, count]: where the largest are, ascending; ties to the earlier.

    capability  compute capability to compile for, as 90; None: that of this machine's GPU
    """
    import jax_triton

    rows, n = scores.shape
    return jax_triton.triton_call(
        scores,
        kernel=body(),
        out_shape=jax.ShapeDtypeStruct((rows, count), jnp.int32),
        grid=(rows,),
        num_warps=8,
        compute_capability=capability,
        N=n,
        COUNT=count,
        BLOCK=max(256, 1 << (n - 1).bit_length()),
    )


@functools.cache
def body() -> Any:
    """The kernel, made where Triton is installed: (scores f32[rows, N], positions i32[rows, COUNT])."""
    import triton
    import triton.language as tl

    globals()["tl"] = tl  # Triton looks names up among the module's

    @triton.jit
    def select(  # type: ignore[no-untyped-def]
        scores_ptr, out_ptr, N: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0)
        at = tl.arange(0, BLOCK)
        inside = at < N
        x = tl.load(scores_ptr + row * N + at, mask=inside, other=float("-inf"))
        x = tl.where(x != x, float("-inf"), x)
        bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
        keys = tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)  # larger for larger scores
        above = at < 0
        equal = inside
        left = COUNT
        for i in tl.static_range(4):
            digit = ((keys >> (24 - 8 * i)) & 255).to(tl.int32)
            counts = tl.histogram(digit, 256, mask=equal)
            # As many digits as still reach what is left: the last of them is the digit of the threshold.
            chosen = tl.sum((tl.cumsum(counts, 0, reverse=True) >= left).to(tl.int32)) - 1
            left -= tl.sum(tl.where(tl.arange(0, 256) > chosen, counts, 0))
            above = above | (equal & (digit > chosen))
            equal = equal & (digit == chosen)
        taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out_ptr + row * COUNT + place, at, mask=taken)

    return select
