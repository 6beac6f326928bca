"""Grouped matmul: rows sorted by group, each times its group's matrix; and a feed-forward made of it.

`reference` is the specification. On TPUs `tpu`, on NVIDIA GPUs `gpu`, elsewhere `blocks`: chosen when a program is
lowered for its target, so that compiling for a machine from another chooses the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.choice import by_platform
from kernels_pallas.grouped_matmul import blocks, gpu, swiglu, tpu
from kernels_pallas.grouped_matmul.rows import gathered, summed
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
    return by_platform(rows, weights, group_sizes, tpu=tpu.forward, cuda=gpu.forward, default=blocks.forward)


def _matmul_forward(rows, weights, group_sizes):
    return _matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _matmul_backward(kept, d_out):
    pulled = by_platform(*kept, d_out, tpu=tpu.backward, cuda=gpu.backward, default=blocks.backward)
    return *pulled, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_swiglu(
    rows: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array | None,
    activation: str = "silu",
) -> jax.Array:
    """Each row through the feed-forward of its group: (act(row gate) * (row up)) down, or act(row up) down.

    rows         [R, D], sorted by group; [G, C, D] where every group has C rows, with group_sizes None
    gate, up     [G, D, F] in rows' dtype; gate None: no gate
    down         [G, F, D]
    group_sizes  i32[G], as for `grouped_matmul`
    activation   "silu", "gelu" (exact) or "relu", computed in float32
    returns      rows' shape and dtype; rows past the last group give 0 and get no gradient

    The backward pass keeps rows, the pre-activations [R, F] of gate and up, and the weights. Raises ValueError for
    shapes or dtypes that do not match and for an unknown activation.
    """
    inward = _inward(rows, gate, up, down, group_sizes, activation)
    return _swiglu(activation, *_all_alike(rows, inward, down, group_sizes))


def routed_swiglu(
    x: jax.Array,
    tokens: jax.Array,
    scale: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array | None,
    activation: str = "silu",
    place: jax.Array | None = None,
) -> jax.Array:
    """For each token the sum over its rows of scale * `grouped_swiglu`(x[tokens]).

    x            [T, D]
    tokens       i32[R] in bounds, the token of each row, sorted by group; i32[G, C] with group_sizes None
    scale        f32, the shape of tokens
    gate, up, down, group_sizes, activation  as for `grouped_swiglu`
    place        i32[T, k], where known the rows of each token; those that exceed the rows do not exist
    returns      f32[T, D]; rows past the last group add nothing and get no gradient

    The backward pass keeps x, the pre-activations [R, F] of gate and up, and the weights: it gathers rows again, and
    needs no results for the gradient of `scale` (SonicMoE, arXiv 2512.14080). Raises ValueError as `grouped_swiglu`.
    """
    rows = jax.ShapeDtypeStruct((*tokens.shape, x.shape[-1]), x.dtype)
    if scale.shape != tokens.shape:
        raise ValueError(f"tokens {tokens.shape}, scale {scale.shape}: must be the same")
    inward = _inward(rows, gate, up, down, group_sizes, activation)
    return _routed(activation, *_all_alike(x, scale, inward, down, tokens, place, group_sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(activation, rows, inward, down, group_sizes):
    return _run(activation, False, rows, inward, down, group_sizes)[0]


def _swiglu_forward(activation, *args):
    out, pre = _run(activation, True, *args)
    return out, (*args, pre)


def _swiglu_backward(activation, kept, d_out):
    rows, inward, down, group_sizes, pre = kept
    return *_pull(activation, rows, inward, down, group_sizes, pre, d_out, None)[:3], None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(activation, *args):
    return _routed_run(activation, False, *args)[0]


def _routed_run(activation, keep, x, scale, inward, down, tokens, place, group_sizes):
    out, pre = _run(activation, keep, gathered(x, tokens), inward, down, group_sizes)
    return summed(out.astype(jnp.float32) * scale[..., None], tokens, place, x.shape[0]), pre


def _routed_forward(activation, *args):
    out, pre = _routed_run(activation, True, *args)
    return out, (*args, pre)


def _routed_backward(activation, kept, d_y):
    x, scale, inward, down, tokens, place, group_sizes, pre = kept
    rows, d_out = gathered(x, tokens), gathered(d_y.astype(x.dtype), tokens)
    d_rows, d_inward, d_down, d_scale = _pull(activation, rows, inward, down, group_sizes, pre, d_out, scale)
    d_x = summed(d_rows.astype(jnp.float32), tokens, place, x.shape[0]).astype(x.dtype)
    return d_x, d_scale, d_inward, d_down, None, None, None


_routed.defvjp(_routed_forward, _routed_backward)


def _run(activation, keep, rows, inward, down, group_sizes):
    options = {"activation": activation, "keep": keep}
    if group_sizes is None:
        return swiglu.forward_by_slots(rows, inward, down, **options)
    return by_platform(
        *(rows, inward, down, group_sizes),
        tpu=functools.partial(swiglu.forward_by_matmuls, tpu.forward, **options),
        cuda=functools.partial(swiglu.forward_by_matmuls, gpu.forward, **options),
        default=functools.partial(swiglu.forward_by_blocks, **options),
    )


def _pull(activation, rows, inward, down, group_sizes, pre, d_out, scale):
    options = {"activation": activation}
    if group_sizes is None:
        return swiglu.backward_by_slots(rows, inward, down, pre, d_out, scale, **options)
    return by_platform(
        *(rows, inward, down, group_sizes, pre, d_out, scale),
        tpu=functools.partial(swiglu.backward_by_matmuls, tpu.backward, **options),
        cuda=functools.partial(swiglu.backward_by_matmuls, gpu.backward, **options),
        default=functools.partial(swiglu.backward_by_blocks, **options),
    )


def _all_alike(*trees: Any) -> Any:
    leaves, form = jax.tree.flatten(trees)
    return jax.tree.unflatten(form, alike(*leaves))


Rows = jax.Array | jax.ShapeDtypeStruct


def _inward(
    rows: Rows,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array | None,
    activation: str,
) -> tuple[jax.Array, ...]:
    """The inward matrices, after a look at all of them."""
    if activation not in swiglu.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: must be one of {', '.join(swiglu.ACTIVATIONS)}")
    inward: tuple[jax.Array, ...] = (up,) if gate is None else (gate, up)
    _check(rows, inward, group_sizes)
    _check(jax.ShapeDtypeStruct((*rows.shape[:-1], up.shape[2]), rows.dtype), (down,), group_sizes)
    return inward


def _check(rows: Rows, matrices: tuple[jax.Array, ...], group_sizes: jax.Array | None) -> None:
    for weights in matrices:
        groups = rows.shape[0] if group_sizes is None else group_sizes.size
        dimensions = 3 if group_sizes is None else 2
        if rows.ndim != dimensions or weights.ndim != 3 or weights.shape[:2] != (groups, rows.shape[-1]):
            sizes = None if group_sizes is None else group_sizes.shape
            shapes = f"rows {rows.shape}, weights {weights.shape}, group_sizes {sizes}"
            raise ValueError(f"{shapes}: must be [R, K], [G, K, N] and [G], or [G, C, K], [G, K, N] and None")
        if weights.dtype != rows.dtype:
            raise ValueError(f"rows are {rows.dtype}, weights {weights.dtype}: must be the same")
