"""Stacks of Mamba-2 and attention blocks on a float32 residual stream, a norm at the end (H-Net paper, section 2.3)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.attention import Attention, AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.feed_forward import FeedForward
from adaptive.layers.layout import Blocks, BlockShape, Run
from adaptive.layers.mamba import Mamba2, MambaState, SSMOptions
from adaptive.layers.norm import RMSNorm
from adaptive.layers.remat import Remat, recomputed
from adaptive.layers.rope import Rope, rope_at
from adaptive.parallel.rules import constrain
from adaptive.routing.types import Selection

MixerState = KeyValues | MambaState
State = tuple[MixerState, ...]  # of a stack: one per run of equal blocks, with a leading axis for them


class Places(NamedTuple):
    """Where the positions of a call stand in their sequences.

    number    i32[batch, n]   place in the position's document, which rotates queries and keys
    segments  i32[batch, n]   documents; None: one per row
    valid     bool[batch, n]  positions that exist, the first of each row; None: all
    seen      i32[batch]      positions of each row that came in earlier calls; with a state alone
    """

    number: jax.Array
    segments: jax.Array | None = None
    valid: jax.Array | None = None
    seen: jax.Array | None = None


class Block(nnx.Module):
    """x + mixer(norm(x)), and for a capital letter x + feed_forward(norm(x)) after it; x the float32 stream."""

    def __init__(
        self, run: Run, shape: BlockShape, *, std: float, out_std: float, key: jax.Array, eps: float, theta: float
    ):
        """Holds all blocks of the run, stacked; out_std: of the matrices that write to the stream."""
        mixer, feed_forward = jax.random.split(key)
        stack = (run.count,)
        self.norm = RMSNorm(shape.width, eps, stack)
        self.mixer: Attention | Mamba2
        if run.attends:
            window = AttentionOptions(window=shape.window + 1)  # ours counts the position itself; 0: all
            self.mixer = Attention(
                shape.width, shape.heads, shape.heads, shape.head_dim, std, mixer, stack,
                options=window, norm_eps=eps, out_std=out_std,
            )  # fmt: skip
        else:
            options = SSMOptions(shape.expand, shape.d_state, shape.d_conv, shape.ssm_head_dim, shape.ssm_block)
            self.mixer = Mamba2(
                shape.width, options, std=std, out_std=out_std, key=mixer, stack=stack, norm_eps=eps
            )  # fmt: skip
        self.feed_forward_norm = RMSNorm(shape.width, eps, stack) if run.has_feed_forward else None
        self.feed_forward = (
            FeedForward(shape.width, shape.feed_forward, std, feed_forward, stack, out_std=out_std)
            if run.has_feed_forward
            else None
        )
        self.shape, self.theta = shape, theta

    def __call__(
        self, stream: jax.Array, places: Places, dtype: Any, state: MixerState | None, keep: bool
    ) -> tuple[jax.Array, MixerState | None]:
        """stream f32[batch, n, width] -> (stream, the state after it); for one block, sliced out of the run."""
        x = self.norm(stream).astype(dtype)
        new: MixerState | None
        if isinstance(self.mixer, Attention):
            update, new = self._attend(self.mixer, x, places, state)
        else:
            assert not isinstance(state, KeyValues)
            update, new = self.mixer(x, segments=places.segments, valid=places.valid, state=state, keep=keep)
        stream = stream + update.astype(jnp.float32)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            stream = stream + self.feed_forward(self.feed_forward_norm(stream).astype(dtype)).astype(jnp.float32)
        return constrain(stream, "batch", "seq", None), new if keep else None

    def empty_state(self, batch: int, length: int, dtype: Any) -> MixerState:
        """Before the first position, of every block of the run; length: positions that it has room for."""
        count = self.norm.weight.shape[0]
        if isinstance(self.mixer, Mamba2):
            one: MixerState = self.mixer.empty_state(batch, dtype)
        else:
            zeros = jnp.zeros((batch, length, self.shape.heads, self.shape.head_dim), dtype)
            one = KeyValues(zeros, zeros)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), one)

    def _attend(
        self, attention: Attention, x: jax.Array, places: Places, state: MixerState | None
    ) -> tuple[jax.Array, KeyValues]:
        rope = rope_at(places.number, self.shape.rotary_dim, self.theta)
        index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        if state is None:
            return attention(x, Rows(rope, index, places.segments))
        assert isinstance(state, KeyValues)
        if places.seen is not None:
            index = index + places.seen[:, None]
        everything = jnp.ones(index.shape, bool)
        update = Selection(index, everything.astype(jnp.float32), everything if places.valid is None else places.valid)
        keys = jnp.broadcast_to(jnp.arange(state.k.shape[1], dtype=jnp.int32), (len(x), state.k.shape[1]))
        unused = Rope(jnp.zeros(()), jnp.zeros(()))
        return attention(x, Rows(rope, index), Memory(state, Rows(unused, keys), update))


class Stack(nnx.Module):
    """Blocks one after another on a float32 residual stream, and a norm at the end."""

    def __init__(
        self,
        blocks: Blocks,
        shape: BlockShape,
        *,
        std: float,
        out_std: float,
        key: jax.Array,
        eps: float,
        theta: float,
        dtype: Any,
        remat: Remat = "none",
        unroll: bool = False,
    ):
        keys = jax.random.split(key, len(blocks))
        self.runs = nnx.List(
            [
                Block(run, shape, std=std, out_std=out_std, key=k, eps=eps, theta=theta)
                for run, k in zip(blocks, keys, strict=True)
            ]
        )
        self.norm = RMSNorm(shape.width, eps)
        self.dtype, self.remat, self.unroll = dtype, remat, unroll

    def __call__(
        self, x: jax.Array, places: Places, state: State | None = None, *, keep: bool = False
    ) -> tuple[jax.Array, State | None]:
        """x [batch, n, width] -> (the same shape in the compute dtype, normalised; with `keep` the state after it).

        state  what the same sequences left behind: they go on, for any n; segments are for calls without
        """
        stream, kept = x.astype(jnp.float32), []
        for i, run in enumerate(self.runs):
            stream, new = self._scan(run, stream, places, None if state is None else state[i], keep)
            kept.append(new)
        return self.norm(stream).astype(self.dtype), tuple(kept) if keep else None

    def empty_state(self, batch: int, length: int) -> State:
        """Before the first position, with room for `length` of them."""
        return tuple(run.empty_state(batch, length, self.dtype) for run in self.runs)

    def _scan(
        self, run: Block, stream: jax.Array, places: Places, state: MixerState | None, keep: bool
    ) -> tuple[jax.Array, Any]:
        graphdef, params = nnx.split(run)

        def body(stream: jax.Array, scanned: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            own, before = scanned
            return nnx.merge(graphdef, own)(stream, places, self.dtype, before, keep)

        return jax.lax.scan(recomputed(body, self.remat), stream, (params, state), unroll=self.unroll or 1)
