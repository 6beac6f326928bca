"""The Mamba-2 layer: a gated selective state space behind a short causal convolution.

Transformers are SSMs (Dao and Gu 2024), section 7; H-Net paper, section 3; released code, mamba_ssm/modules/mamba2.py.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost, Span
from adaptive.layers.linear import projected, times, use
from adaptive.layers.mixers import Mixer, MixerModule
from adaptive.layers.site import Site, normal_param, param
from adaptive.layers.where import Where
from adaptive.parallel.context import convolved, ssd
from adaptive.parallel.rows import gather, scatter
from adaptive.parallel.rules import constrain
from adaptive.settings import ranged
from kernels_pallas.ssd import plain_blocks

DT_RANGE, DT_FLOOR = (1e-3, 1e-1), 1e-4  # the step sizes that dt_bias starts with: log-uniform, then at least the floor
A_RANGE = (1.0, 16.0)  # the decay rates -a: uniform


@dataclasses.dataclass(frozen=True)
class Settings(Mixer):
    """Mamba-2 with one group of state-space inputs, as in the H-Net release."""

    expand: int = ranged(2, least=1)  # inner channels over the width of the residual stream
    d_state: int = ranged(128, least=1)  # numbers that every inner channel carries along the sequence
    d_conv: int = ranged(4, least=1)  # taps of the convolution
    head_dim: int = ranged(64, least=1)  # channels of a head, which share their step size and decay
    block: int = ranged(256, least=1)  # positions of a block of the parallel form, at most (`kernels_pallas.ssd.ssd`)

    def heads(self, width: int) -> int:
        """Heads of a layer of `width`."""
        return self.expand * width // self.head_dim

    def kernels(self) -> tuple[str, ...]:
        return ("ssd",)

    def check(self, width: int, at: str) -> None:
        inner = self.expand * width
        if inner % self.head_dim:
            step = self.head_dim // math.gcd(self.expand, self.head_dim)
            near = min((max(step, width // step * step), (width // step + 1) * step), key=lambda w: abs(w - width))
            raise RecipeError(
                f"{at}.expand * width = {inner} is not a multiple of {at}.head_dim={self.head_dim}; "
                f"nearest width: {near}"
            )

    def parameters(self, width: int) -> int:
        inner, heads = self.heads(width) * self.head_dim, self.heads(width)
        channels = inner + 2 * self.d_state  # of the convolution
        matrices = width * (inner + channels + heads) + inner * width
        return matrices + channels * (self.d_conv + 1) + 3 * heads + inner

    def cost(self, width: int, span: Span) -> Cost:
        """All positions run through the scan, in its blocks in plain jax.numpy (larger ones on accelerators).

        Of a block of q positions: which position reads which [q, q], once for all heads; what they read [q, q] by
        [q, head_dim] for each; reading from the state and writing to it. The backward pass keeps the inputs alone: it
        computes the states again, and of each block the first and the third.
        """
        tokens, inner, n = span.queries, self.heads(width) * self.head_dim, self.d_state
        blocks, q = plain_blocks(math.ceil(tokens), self.block) if tokens else (0, 0)
        match, mixed, state = 2.0 * q * q * n, 2.0 * q * q * inner, 2.0 * q * inner * n
        out = 2.0 * tokens * inner * width
        return Cost(
            projections=2.0 * tokens * width * (2 * inner + 2 * n + self.heads(width)) + out,
            state_space=blocks * (match + mixed + 2 * state),
            state_space_useful=tokens * (q + 1) * (n + inner) + 4.0 * tokens * inner * n,
            state_space_again=blocks * (match + 2 * state),
            last=out,
        )

    def build(self, site: Site, key: jax.Array) -> "Mamba2":
        return Mamba2(self, site, key)


class MambaState(NamedTuple):
    """What a layer carries along a sequence.

    conv  [batch, d_conv, heads * head_dim + 2 * d_state]: the last inputs of the convolution, newest last; 0 where
          there were none
    ssm   f32[batch, heads, head_dim, d_state]
    """

    conv: jax.Array
    ssm: jax.Array


class Mamba2(MixerModule):
    """out(rms_norm((ssd(x) + d x) silu(z))) with x, b and c from the convolution of one projection, z of another."""

    def __init__(self, settings: Settings, site: Site, key: jax.Array):
        s, width, stack, std = settings, site.width, site.stack, site.std
        heads, dim, taps, n = s.heads(width), s.head_dim, s.d_conv, s.d_state
        z, x, bc, dt, out, *rest = jax.random.split(key, 11)
        self.z = normal_param(z, (width, heads, dim), ("width", "heads", None), std, stack)
        self.x = normal_param(x, (width, heads, dim), ("width", "heads", None), std, stack)
        self.bc = normal_param(bc, (width, 2 * n), ("width", None), std, stack)
        self.dt = normal_param(dt, (width, heads), ("width", "heads"), std, stack)
        self.out = normal_param(out, (heads, dim, width), ("heads", None, "width"), site.writes_std, stack)

        def uniform(key: jax.Array, *shape: int, low: float, high: float) -> jax.Array:
            return jax.random.uniform(key, (*stack, *shape), jnp.float32, low, high)

        make = functools.partial(param, stack=stack)
        bound = 1 / math.sqrt(taps)
        tap = functools.partial(uniform, low=-bound, high=bound)
        self.conv_x = make(tap(rest[0], taps, heads, dim), (None, "heads", None), role="kernel")
        self.conv_x_bias = make(tap(rest[1], heads, dim), ("heads", None), role="bias")
        self.conv_bc = make(tap(rest[2], taps, 2 * n), (None, None), role="kernel")
        self.conv_bc_bias = make(tap(rest[3], 2 * n), (None,), role="bias")

        low, high = map(math.log, DT_RANGE)
        start = jnp.maximum(jnp.exp(uniform(rest[4], heads, low=low, high=high)), DT_FLOOR)
        # softplus of it is `start`
        self.dt_bias = make(start + jnp.log(-jnp.expm1(-start)), ("heads",), role="vector")
        rates = uniform(rest[5], heads, low=A_RANGE[0], high=A_RANGE[1])
        self.a_log = make(jnp.log(rates), ("heads",), role="vector")
        self.d = make(jnp.ones((*stack, heads)), ("heads",), role="vector")
        self.norm = make(jnp.ones((*stack, heads, dim)), ("heads", None), role="gated_scale")
        self.settings, self.norm_eps = settings, site.norm_eps

    def __call__(
        self, x: jax.Array, where: Where, call: Call, state: MambaState | None
    ) -> tuple[jax.Array, MambaState | None, Told]:
        """As every mixer. At positions that do not exist the update is finite and without meaning; nothing passes from
        one document to another. A state is of the first position's document."""
        keep = call.keep or state is not None
        if where.scattered and where.exists is not None and x.shape[1] > 1:
            # The convolution reads neighbours, so those that exist come first.
            order = jnp.argsort(~where.exists, axis=1, stable=True).astype(jnp.int32)
            at = lambda a: gather(a, order)  # noqa: E731
            segments = None if where.segments is None else at(where.segments)
            update, after = self._apply(at(x), segments, at(where.exists), state, keep)
            return scatter(x, order, update.astype(x.dtype)), after, Told()
        update, after = self._apply(x, where.segments, where.exists, state, keep)
        return update, after, Told()

    def _apply(
        self, x: jax.Array, segments: jax.Array | None, valid: jax.Array | None, state: MambaState | None, keep: bool
    ) -> tuple[jax.Array, MambaState | None]:
        """The update of x, and with `keep` the state after its last valid position; the valid ones are the first."""
        if segments is not None and valid is not None:
            segments = _extended(segments, valid)
        before = self.empty(x.shape[0], 0, x.dtype) if state is None else state
        inputs = projected(x, self.x), constrain(times(x, use(self.bc, x.dtype)), "batch", "seq", None)
        inner, bc = self._convolved(inputs, before.conv, segments)
        dt = jnp.einsum("bnw,wh->bnh", x, use(self.dt, x.dtype), preferred_element_type=jnp.float32)
        dt = jax.nn.softplus(dt + use(self.dt_bias, jnp.float32))
        if valid is not None:
            dt = jnp.where(valid[..., None], dt, 0)  # neither decays nor writes
        y, ssm = self._scanned(inner, dt, bc, segments, before.ssm)
        y = _gated_norm(y, inner, projected(x, self.z), self.d[...], self.norm[...], self.norm_eps)
        out = use(self.out, x.dtype)
        update = times(y.reshape(*y.shape[:2], -1), out.reshape(-1, out.shape[-1]))
        return update, MambaState(_last(inputs, before.conv, valid), ssm) if keep else None

    def _convolved(
        self, inputs: tuple[jax.Array, jax.Array], before: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The inputs [batch, n, heads, head_dim] and [batch, n, 2 * d_state] after the convolution that mixes them."""
        x, bc = inputs
        before_x, before_bc = jnp.split(before[:, 1:].astype(x.dtype), [x.shape[2] * x.shape[3]], axis=-1)
        before_x = before_x.reshape(*before_x.shape[:2], *x.shape[2:])
        taps, bias = use(self.conv_x, jnp.float32), use(self.conv_x_bias, jnp.float32)
        x = convolved(_convolution, x, before_x, taps, bias, segments, ("heads", None))
        taps, bias = use(self.conv_bc, jnp.float32), use(self.conv_bc_bias, jnp.float32)
        bc = convolved(_convolution, bc, before_bc, taps, bias, segments, (None,))
        return constrain(x, "batch", "seq", "heads", None), constrain(bc, "batch", "seq", None)

    def _scanned(
        self, x: jax.Array, dt: jax.Array, bc: jax.Array, segments: jax.Array | None, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """y like x and the last state."""
        b, c = jnp.split(bc, 2, axis=-1)
        a = -jnp.exp(use(self.a_log, jnp.float32))
        return ssd(x, dt, a, b, c, segments=segments, state=state, block=self.settings.block)

    def empty(self, rows: int, slots: int, dtype: Any) -> MambaState:
        heads, dim = self.norm.shape[-2:]
        taps, n = self.settings.d_conv, self.settings.d_state
        ssm = jnp.zeros((rows, heads, dim, n), jnp.float32)
        return MambaState(jnp.zeros((rows, taps, heads * dim + 2 * n), dtype), ssm)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _convolution(inputs: jax.Array, weight: jax.Array, bias: jax.Array, segments: jax.Array | None) -> jax.Array:
    """silu(causal depthwise convolution), in float32, returned in the inputs' dtype: [batch, n, *channels].

    inputs    [batch, taps - 1 + n, *channels]: those of n positions, after those before them
    weight    [taps, *channels], the newest input's last; bias [*channels]
    segments  i32[batch, taps - 1 + n]: nothing passes from one to another; None: all are of one
    """
    taps = weight.shape[0]
    n, dtype = inputs.shape[1] - taps + 1, inputs.dtype
    inputs = inputs.astype(jnp.float32)
    same = None if segments is None else _same_segment(segments, taps)
    total = jnp.broadcast_to(bias, (inputs.shape[0], n, *inputs.shape[2:]))
    for ago in range(taps):
        first = taps - 1 - ago
        tap = inputs[:, first : first + n]
        if same is not None:
            tap = jnp.where(same[ago].reshape(*tap.shape[:2], *(1,) * (tap.ndim - 2)), tap, 0)
        total += weight[first] * tap
    return jax.nn.silu(total).astype(dtype)


def _same_segment(segments: jax.Array, taps: int) -> tuple[jax.Array, ...]:
    """For each tap, newest first, bool[batch, n]: no segment begins between it and the position.

    segments  i32[batch, taps - 1 + n]
    """
    changes = (segments[:, 1:] != segments[:, :-1]).astype(jnp.int32)
    runs = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    n = runs.shape[1] - taps + 1
    return tuple(runs[:, taps - 1 - ago :][:, :n] == runs[:, taps - 1 :] for ago in range(taps))


def _extended(segments: jax.Array, valid: jax.Array) -> jax.Array:
    """The segments, with positions that are not valid in that of the row's last valid one."""
    last = jnp.maximum(valid.sum(axis=1, keepdims=True, dtype=jnp.int32) - 1, 0)
    return jnp.where(valid, segments, jnp.take_along_axis(segments, last, axis=1))


def _last(inputs: tuple[jax.Array, jax.Array], before: jax.Array, valid: jax.Array | None) -> jax.Array:
    """[batch, taps, channels]: the inputs of the convolution up to each row's last valid position."""
    taps = before.shape[1]
    own = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in inputs], axis=-1)
    both = jnp.concatenate([before, own.astype(before.dtype)], axis=1)
    if valid is None:
        return both[:, -taps:]
    index = valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(taps, dtype=jnp.int32)
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
