"""State space duality: the selective state space recurrence of Mamba-2, by matmuls within blocks of positions.

`reference` is the specification. On TPUs `tpu`, on NVIDIA GPUs `gpu` where it takes the states, elsewhere `chunked`:
chosen when a program is lowered for its target. Gradients are computed by the same.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.choice import by_platform
from kernels_pallas.grouped_matmul.varying import alike
from kernels_pallas.ssd import chunked, gpu, reference, tpu
from kernels_pallas.ssd.blocks import accumulator, runs_of

BLOCK = 256
PLAIN_BLOCK = 64  # in plain jax.numpy at most, whatever is asked for: matrices of a block must fit the cache


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    own = {
        "tpu": "Pallas for TPUs",
        "gpu": f"Pallas through Triton, states of more than {gpu.LARGEST:,} numbers by blocks in XLA",
    }
    return own.get(platform, "blocks in XLA: Pallas kernels are for TPUs and NVIDIA GPUs")


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    segments: jax.Array | None = None,
    state: jax.Array | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """state_t = exp(dt_t a) state_{t-1} + dt_t x_t b_t^T and y_t = state_t c_t, for each head.

    x         [batch, seq, heads, dim]
    dt        f32[batch, seq, heads], at least 0; where it is 0 the state neither decays nor is written to: padding
    a         f32[heads], below 0
    b, c      [batch, seq, n]: what all heads write to and read from
    segments  i32[batch, seq]: the state restarts from 0 where the id changes; None: one segment per row
    state     f32[batch, heads, dim, n] before the first position, of the same segment; None: 0
    block     positions of a block, at most; the forms for a machine use fewer where that is faster on it
    returns   y [batch, seq, heads, dim] in x's dtype, and the state f32[batch, heads, dim, n] after the last position

    Sums and states are float32. `seq` is any length from 1; one position is one step of the recurrence. Gradients reach
    everything but the segments. Raises ValueError for shapes that do not match and for a block below 1.
    """
    _check(x, dt, a, b, c, segments, state, block)
    if state is None:
        state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]), accumulator(x))
    if x.shape[1] == 1:
        y, final = reference.step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
        return y[:, None], final
    return _ssd(block, *alike(x, dt, a, b, c, runs_of(x, segments), state))


def plain_blocks(seq: int, block: int = BLOCK) -> tuple[int, int]:
    """(how many, positions of each): the blocks that `seq` positions are cut into in plain jax.numpy."""
    size = chunked.block_of(seq, min(block, PLAIN_BLOCK))
    return -(-seq // size), size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(block: int, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    plain = functools.partial(chunked.forward, block=min(block, PLAIN_BLOCK))
    if accumulator(inputs[0]) != jnp.float32:
        return plain(*inputs)
    return by_platform(*inputs, tpu=tpu.forward, cuda=gpu.forward if _fit_gpu(inputs) else plain, default=plain)


def _ssd_forward(block, *inputs):
    return _ssd(block, *inputs), inputs


def _ssd_backward(block, inputs, cotangents):
    plain = functools.partial(chunked.backward, block=min(block, PLAIN_BLOCK))
    forms = {"tpu": tpu.backward, "cuda": gpu.backward if _fit_gpu(inputs) else plain, "default": plain}
    if accumulator(inputs[0]) != jnp.float32:
        forms = dict.fromkeys(forms, plain)
    *d, d_state = by_platform(*inputs, *cotangents, **forms)
    return *d, None, d_state


def _fit_gpu(inputs: tuple[jax.Array, ...]) -> bool:
    return gpu.takes(*inputs[-1].shape[-2:])


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _check(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    segments: jax.Array | None,
    state: jax.Array | None,
    block: int,
) -> None:
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x is {x.shape}: must be [batch, seq, heads, dim] with at least one position")
    batch, seq, heads, dim = x.shape
    n = b.shape[-1]
    expected: dict[str, tuple[jax.Array | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, seq, heads)),
        "a": (a, (heads,)),
        "b": (b, (batch, seq, n)),
        "c": (c, (batch, seq, n)),
        "segments": (segments, (batch, seq)),
        "state": (state, (batch, heads, dim, n)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {value.shape}, x is {x.shape} and b {b.shape}: {name} must be {shape}")
    if block < 1:
        raise ValueError(f"block is {block}: must be at least 1")
