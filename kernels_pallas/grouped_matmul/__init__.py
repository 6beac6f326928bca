"""Grouped matmul: rows sorted by group, each times its group's matrix; and a feed-forward made of it.

`reference` is the specification. On TPUs `tpu`, on NVIDIA GPUs `gpu`, elsewhere `blocks`: chosen when a program is
lowered for its target, so that compiling for a machine from another chooses the same.
"""

import functools

import jax
from jax import lax

from kernels_pallas.grouped_matmul import blocks, gpu, swiglu, tpu
from kernels_pallas.grouped_matmul.varying import alike


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    own = {"tpu": "Pallas for TPUs", "gpu": "Pallas through Triton"}
    return own.get(platform, "blocks in XLA: Pallas kernels are for TPUs and NVIDIA GPUs")


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row times the matrix of its group.

    rows         [R, K], sorted by group: the first group_sizes[0] rows belong to group 0, and so on
    weights      [G, K, N] in rows' dtype
    group_sizes  i32[G], at least 0, with a sum of at most R; groups may be empty
    returns      [R, N] in rows' dtype, summed in float32; rows past the last group give 0 and get no gradient

    The backward pass keeps rows and weights, nothing else. Raises ValueError for shapes or dtypes that do not match.
    """
    _check(rows, (weights,), group_sizes)
    return _matmul(*alike(rows, weights, group_sizes))


@jax.custom_vjp
def _matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.platform_dependent(rows, weights, group_sizes, tpu=tpu.forward, cuda=gpu.forward, default=blocks.forward)


def _matmul_forward(rows, weights, group_sizes):
    return _matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _matmul_backward(kept, d_out):
    pulled = lax.platform_dependent(*kept, d_out, tpu=tpu.backward, cuda=gpu.backward, default=blocks.backward)
    return *pulled, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_swiglu(
    rows: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    activation: str = "silu",
) -> jax.Array:
    """Each row through the feed-forward of its group: (act(row gate) * (row up)) down, or act(row up) down.

    rows         [R, D], sorted by group
    gate, up     [G, D, F] in rows' dtype; gate None: no gate
    down         [G, F, D]
    group_sizes  i32[G], as for `grouped_matmul`
    activation   "silu", "gelu" (exact) or "relu", computed in float32
    returns      [R, D] in rows' dtype; rows past the last group give 0 and get no gradient

    The backward pass keeps rows, the pre-activations [R, F] of gate and up, and the weights. Raises ValueError for
    shapes or dtypes that do not match and for an unknown activation.
    """
    if activation not in swiglu.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: must be one of {', '.join(swiglu.ACTIVATIONS)}")
    inward: tuple[jax.Array, ...] = (up,) if gate is None else (gate, up)
    _check(rows, inward, group_sizes)
    _check(jax.ShapeDtypeStruct((rows.shape[0], up.shape[2]), rows.dtype), (down,), group_sizes)
    rows, down, group_sizes, *into = alike(rows, down, group_sizes, *inward)
    return _swiglu(activation, rows, tuple(into), down, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(activation, rows, inward, down, group_sizes):
    return _swiglu_run(activation, False, rows, inward, down, group_sizes)[0]


def _swiglu_run(activation, keep, *args):
    options = {"activation": activation, "keep": keep}
    return lax.platform_dependent(
        *args,
        tpu=functools.partial(swiglu.forward_by_matmuls, tpu.forward, **options),
        cuda=functools.partial(swiglu.forward_by_matmuls, gpu.forward, **options),
        default=functools.partial(swiglu.forward_by_blocks, **options),
    )


def _swiglu_forward(activation, *args):
    out, pre = _swiglu_run(activation, True, *args)
    return out, (*args, pre)


def _swiglu_backward(activation, kept, d_out):
    pulled = lax.platform_dependent(
        *kept,
        d_out,
        tpu=functools.partial(swiglu.backward_by_matmuls, tpu.backward, activation=activation),
        cuda=functools.partial(swiglu.backward_by_matmuls, gpu.backward, activation=activation),
        default=functools.partial(swiglu.backward_by_blocks, activation=activation),
    )
    return *pulled, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _check(rows: jax.Array | jax.ShapeDtypeStruct, matrices: tuple[jax.Array, ...], group_sizes: jax.Array) -> None:
    for weights in matrices:
        if rows.ndim != 2 or weights.ndim != 3 or weights.shape[:2] != (group_sizes.size, rows.shape[1]):
            shapes = f"rows {rows.shape}, weights {weights.shape}, group_sizes {group_sizes.shape}"
            raise ValueError(f"{shapes}: must be [R, K], [G, K, N] and [G]")
        if weights.dtype != rows.dtype:
            raise ValueError(f"rows are {rows.dtype}, weights {weights.dtype}: must be the same")
