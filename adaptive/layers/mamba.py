"""The Mamba-2 layer: a gated selective state space behind a short causal convolution.

Transformers are SSMs (Dao and Gu 2024), section 7; H-Net paper, section 3; released code, mamba_ssm/modules/mamba2.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import normal_param, use
from adaptive.parallel.rules import constrain
from adaptive.parallel.shard import sharded
from kernels_pallas.ssd import ssd

DT_RANGE, DT_FLOOR = (1e-3, 1e-1), 1e-4  # the step sizes that dt_bias starts with: log-uniform, then at least the floor
A_RANGE = (1.0, 16.0)  # the decay rates -a: uniform


class SSMOptions(NamedTuple):
    """Sizes of a Mamba-2 layer.

    expand    inner channels over the width of the residual stream
    d_state   numbers that every inner channel carries along the sequence
    d_conv    taps of the convolution
    head_dim  channels of a head, which share their step size and decay
    block     positions of a block of the parallel form, at most; see `kernels_pallas.ssd.ssd`
    """

    expand: int = 2
    d_state: int = 128
    d_conv: int = 4
    head_dim: int = 64
    block: int = 256

    def heads(self, width: int) -> int:
        """Heads of a layer of `width`. Raises ValueError where they do not divide its inner channels."""
        if self.expand * width % self.head_dim:
            inner = f"expand * width = {self.expand} * {width} = {self.expand * width}"
            raise ValueError(f"{inner} is not a multiple of head_dim={self.head_dim}; change one of the three")
        return self.expand * width // self.head_dim


class MambaState(NamedTuple):
    """What a layer carries along a sequence.

    conv  [batch, d_conv, heads * head_dim + 2 * d_state]: the last inputs of the convolution, newest last; 0 where
          there were none
    ssm   f32[batch, heads, head_dim, d_state]
    """

    conv: jax.Array
    ssm: jax.Array


class Mamba2(nnx.Module):
    """out(rms_norm((ssd(x) + d x) silu(z))) with x, b and c from the convolution of one projection, z of another."""

    def __init__(
        self,
        width: int,
        options: SSMOptions,
        *,
        std: float,
        out_std: float,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        norm_eps: float = 1e-5,
    ):
        """std: of initial projections; out_std: of the last. Raises ValueError as `SSMOptions.heads` does."""
        heads, dim, taps, n = options.heads(width), options.head_dim, options.d_conv, options.d_state
        z, x, bc, dt, out, *rest = jax.random.split(key, 11)
        lead = (None,) * len(stack)
        self.z = normal_param(z, (width, heads, dim), ("width", "heads", None), std, stack)
        self.x = normal_param(x, (width, heads, dim), ("width", "heads", None), std, stack)
        self.bc = normal_param(bc, (width, 2 * n), ("width", None), std, stack)
        self.dt = normal_param(dt, (width, heads), ("width", "heads"), std, stack)
        self.out = normal_param(out, (heads, dim, width), ("heads", None, "width"), out_std, stack)

        def uniform(key: jax.Array, *shape: int, low: float, high: float) -> jax.Array:
            return jax.random.uniform(key, (*stack, *shape), jnp.float32, low, high)

        bound = 1 / math.sqrt(taps)
        tap = functools.partial(uniform, low=-bound, high=bound)
        self.conv_x = nnx.Param(tap(rest[0], taps, heads, dim), axes=(*lead, None, "heads", None))
        self.conv_x_bias = nnx.Param(tap(rest[1], heads, dim), axes=(*lead, "heads", None))
        self.conv_bc = nnx.Param(tap(rest[2], taps, 2 * n), axes=(*lead, None, None))
        self.conv_bc_bias = nnx.Param(tap(rest[3], 2 * n), axes=(*lead, None))

        per_head = (*lead, "heads")
        low, high = map(math.log, DT_RANGE)
        start = jnp.maximum(jnp.exp(uniform(rest[4], heads, low=low, high=high)), DT_FLOOR)
        self.dt_bias = nnx.Param(start + jnp.log(-jnp.expm1(-start)), axes=per_head)  # softplus of it is `start`
        self.a_log = nnx.Param(jnp.log(uniform(rest[5], heads, low=A_RANGE[0], high=A_RANGE[1])), axes=per_head)
        self.d = nnx.Param(jnp.ones((*stack, heads)), axes=per_head)
        self.norm = nnx.Param(jnp.ones((*stack, heads, dim)), axes=(*per_head, None))
        self.options, self.norm_eps = options, norm_eps

    def __call__(
        self,
        x: jax.Array,
        *,
        segments: jax.Array | None = None,
        valid: jax.Array | None = None,
        state: MambaState | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, MambaState | None]:
        """The update of x, and with `keep` the state after its last valid position.

        x         [batch, n, width]
        segments  i32[batch, n]: documents; nothing passes from one to another. None: one per row
        valid     bool[batch, n]: positions that exist, the first of each row; None: all. At the others the update is
                  finite and without meaning
        state     what the same sequences left behind: they go on, for any n; it is of the first position's document
        returns   [batch, n, width] in x's dtype
        """
        if segments is not None and valid is not None:
            segments = _extended(segments, valid)
        before = self.empty_state(x.shape[0], x.dtype) if state is None else state
        inputs = _project(x, self.x), constrain(x @ use(self.bc, x.dtype), "batch", "seq", None)
        inner, bc = self._convolved(inputs, before.conv, segments)
        dt = jnp.einsum("bnw,wh->bnh", x, use(self.dt, x.dtype), preferred_element_type=jnp.float32)
        dt = jax.nn.softplus(dt + use(self.dt_bias, jnp.float32))
        if valid is not None:
            dt = jnp.where(valid[..., None], dt, 0)  # neither decays nor writes
        y, ssm = self._scanned(inner, dt, bc, segments, before.ssm)
        y = _gated_norm(y, inner, _project(x, self.z), self.d[...], self.norm[...], self.norm_eps)
        out = use(self.out, x.dtype)
        update = y.reshape(*y.shape[:2], -1) @ out.reshape(-1, out.shape[-1])
        return update, MambaState(_last(inputs, before.conv, valid), ssm) if keep else None

    def _convolved(
        self, inputs: tuple[jax.Array, jax.Array], before: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The inputs [batch, n, heads, head_dim] and [batch, n, 2 * d_state] after the convolution that mixes them."""
        x, bc = inputs
        same = _same_segment(segments, self.options.d_conv) if segments is not None else None
        before_x, before_bc = jnp.split(before[:, 1:].astype(x.dtype), [x.shape[2] * x.shape[3]], axis=-1)
        before_x = before_x.reshape(*before_x.shape[:2], *x.shape[2:])
        x = _convolution(x, before_x, use(self.conv_x, jnp.float32), use(self.conv_x_bias, jnp.float32), same)
        bc = _convolution(bc, before_bc, use(self.conv_bc, jnp.float32), use(self.conv_bc_bias, jnp.float32), same)
        return constrain(x, "batch", "seq", "heads", None), constrain(bc, "batch", "seq", None)

    def _scanned(
        self, x: jax.Array, dt: jax.Array, bc: jax.Array, segments: jax.Array | None, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """y like x and the last state, each device computing its own heads of its own rows."""
        rows, split = ("batch",), ("batch", "seq", "heads")
        carried = ("batch", "heads")

        def local(
            x: jax.Array, dt: jax.Array, a: jax.Array, bc: jax.Array, state: jax.Array, segments: jax.Array | None
        ) -> tuple[jax.Array, jax.Array]:
            b, c = jnp.split(bc, 2, axis=-1)
            return ssd(x, dt, a, b, c, segments=segments, state=state, block=self.options.block)

        a = -jnp.exp(use(self.a_log, jnp.float32))
        names = [split, split, ("heads",), rows, carried, None if segments is None else rows]
        return sharded(local, names, (split, carried))(x, dt, a, bc, state, segments)

    def empty_state(self, batch: int, dtype: jax.typing.DTypeLike) -> MambaState:
        """The state before the first position; dtype: of the inputs that are to come."""
        heads, dim = self.norm.shape[-2:]
        taps, n = self.options.d_conv, self.options.d_state
        ssm = jnp.zeros((batch, heads, dim, n), jnp.float32)
        return MambaState(jnp.zeros((batch, taps, heads * dim + 2 * n), dtype), ssm)


def _project(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x [batch, n, width] -> [batch, n, heads, head_dim]."""
    w = use(weight, x.dtype)
    out = (x @ w.reshape(w.shape[0], -1)).reshape(*x.shape[:2], *w.shape[1:])
    return constrain(out, "batch", "seq", "heads", None)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _convolution(
    x: jax.Array, before: jax.Array, weight: jax.Array, bias: jax.Array, same: tuple[jax.Array, ...] | None
) -> jax.Array:
    """silu(causal depthwise convolution of x), in float32, returned in x's dtype.

    x       [batch, n, *channels]
    before  [batch, taps - 1, *channels]: what came before it
    weight  [taps, *channels], the newest input's last; bias [*channels]
    same    bool[batch, n] for each tap: whether it is of the position's segment, newest first; None: all are
    """
    taps, n = weight.shape[0], x.shape[1]
    inputs = jnp.concatenate([before, x], axis=1).astype(jnp.float32)
    total = jnp.broadcast_to(bias, x.shape)
    for ago in range(taps):
        first = taps - 1 - ago
        tap = inputs[:, first : first + n]
        if same is not None:
            tap = jnp.where(same[ago].reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), tap, 0)
        total += weight[first] * tap
    return jax.nn.silu(total).astype(x.dtype)


def _same_segment(segments: jax.Array, taps: int) -> tuple[jax.Array, ...]:
    """For each tap, newest first, bool[batch, n]: no segment begins between it and the position.

    What was carried in is of the first position's segment.
    """
    changes = (segments[:, 1:] != segments[:, :-1]).astype(jnp.int32)
    runs = jnp.pad(jnp.cumsum(changes, axis=1), ((0, 0), (1, 0)))
    past = jnp.pad(runs, ((0, 0), (taps - 1, 0)))
    return tuple(past[:, taps - 1 - ago :][:, : runs.shape[1]] == runs for ago in range(taps))


def _extended(segments: jax.Array, valid: jax.Array) -> jax.Array:
    """The segments, with positions that are not valid in that of the row's last valid one."""
    last = jnp.maximum(valid.sum(axis=1, keepdims=True) - 1, 0)
    return jnp.where(valid, segments, jnp.take_along_axis(segments, last, axis=1))


def _last(inputs: tuple[jax.Array, jax.Array], before: jax.Array, valid: jax.Array | None) -> jax.Array:
    """[batch, taps, channels]: the inputs of the convolution up to each row's last valid position."""
    taps = before.shape[1]
    own = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in inputs], axis=-1)
    both = jnp.concatenate([before, own.astype(before.dtype)], axis=1)
    if valid is None:
        return both[:, -taps:]
    index = valid.sum(axis=1)[:, None] + jnp.arange(taps)
    return jnp.take_along_axis(both, index[..., None], axis=1)


@functools.partial(jax.checkpoint, static_argnums=5, prevent_cse=False)
def _gated_norm(y: jax.Array, x: jax.Array, z: jax.Array, d: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """rms_norm((y + d x) silu(z)) * weight over heads and head_dim together, in float32, returned in x's dtype.

    y, x and z [batch, n, heads, head_dim], d [heads], weight [heads, head_dim].
    """
    y, skip, z = (value.astype(jnp.float32) for value in (y, x, z))
    gated = (y + d[:, None] * skip) * jax.nn.silu(z)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(gated), axis=(-2, -1), keepdims=True) + eps)
    return (gated * scale * weight).astype(x.dtype)
