"""Grouped-query attention among a set of positions, with keys that may come from elsewhere."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import normal_param, use
from adaptive.layers.norm import RMSNorm
from adaptive.layers.rope import Rope, rotate
from adaptive.parallel.rules import constrain
from adaptive.routing.rows import set_rows, take_rows
from adaptive.routing.types import Selection
from kernels_pallas.attention import causal_attention


class Rows(NamedTuple):
    """A set of positions of each sequence, in ascending order.

    rope      tables at the original positions
    index     i32[batch, n]   place in the row, which orders queries and keys; None: 0..n-1
    segments  i32[batch, n]   documents; attention stays inside one; None: one document per row
    valid     bool[batch, n]  positions that exist as keys; None: all
    """

    rope: Rope
    index: jax.Array | None = None  # type: ignore[assignment]  # hides tuple.index
    segments: jax.Array | None = None
    valid: jax.Array | None = None

    def present(self) -> jax.Array | None:
        """bool[batch, n]: positions that hold a token; None: all."""
        if self.valid is not None or self.segments is None:
            return self.valid
        return self.segments > 0


class KeyValues(NamedTuple):
    """Rotated keys and values [batch, n, kv_heads, head_dim]."""

    k: jax.Array
    v: jax.Array


class Memory(NamedTuple):
    """Keys and values computed earlier, at positions `rows`, that a layer attends to instead of its own.

    update  where in `rows` this layer's own keys and values replace the old: one slot per query, those that are not
            valid keep the old; None: nowhere, and no keys or values are computed
    """

    kv: KeyValues
    rows: Rows
    update: Selection | None = None


class AttentionOptions(NamedTuple):
    """What relatives of Llama add to its attention.

    bias      all four projections have one (Qwen)
    qk_norm   RMSNorm of queries and keys ahead of the rotation: "head" over each head, with weights that the heads
              share (Qwen3), "full" over the whole projection (OLMoE)
    clip_qkv  bound on the absolute value of queries, keys and values, after the norm (OLMoE); 0: none
    window    how many positions of the row a query sees, its own the last of them (Mistral); 0: all
    """

    bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float = 0.0
    window: int = 0


LLAMA = AttentionOptions()


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions; see AttentionOptions."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        std: float,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        *,
        options: AttentionOptions = LLAMA,
        norm_eps: float = 1e-5,
        out_std: float | None = None,
    ):
        """out_std: of the output projection's initial weights; None: as the others."""
        q, k, v, o = jax.random.split(key, 4)
        projection = ("width", "heads", None)
        self.q = normal_param(q, (width, heads, head_dim), projection, std, stack)
        self.k = normal_param(k, (width, kv_heads, head_dim), projection, std, stack)
        self.v = normal_param(v, (width, kv_heads, head_dim), projection, std, stack)
        out_std = std if out_std is None else out_std
        self.o = normal_param(o, (heads, head_dim, width), ("heads", None, "width"), out_std, stack)

        def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((*stack, *shape)), axes=(None,) * len(stack) + axes) if options.bias else None

        self.q_bias = zeros((heads, head_dim), ("heads", None))
        self.k_bias = zeros((kv_heads, head_dim), ("heads", None))
        self.v_bias = zeros((kv_heads, head_dim), ("heads", None))
        self.o_bias = zeros((width,), (None,))
        whole = heads * head_dim, kv_heads * head_dim
        widths = {"none": (0, 0), "head": (head_dim, head_dim), "full": whole}[options.qk_norm]
        self.q_norm, self.k_norm = (RMSNorm(w, norm_eps, stack) if w else None for w in widths)
        self.clip_qkv, self.window = options.clip_qkv, options.window

    def __call__(self, x: jax.Array, rows: Rows, memory: Memory | None = None) -> tuple[jax.Array, KeyValues]:
        """x [batch, n, width] at `rows` -> (its update of the same shape, the keys and values it attended to)."""
        q = rotate(self._project(x, self.q, self.q_bias, self.q_norm), rows.rope)
        if memory is None:
            kv, keys = self._keys_values(x, rows), rows
            # Order alone tells what is earlier, but not how much earlier.
            q_index = k_index = rows.index if self.window else None
        else:
            kv, keys = memory.kv, memory.rows
            if memory.update is not None:
                kv = replaced(kv, self._keys_values(x, rows), memory.update)
            q_index, k_index = rows.index, keys.index
        out = causal_attention(
            q,
            kv.k,
            kv.v,
            q_index=q_index,
            k_index=k_index,
            q_segments=rows.segments,
            k_segments=keys.segments,
            k_valid=keys.valid,
            window=self.window,
        )
        o = use(self.o, x.dtype)
        out = out.reshape(*out.shape[:2], -1) @ o.reshape(-1, o.shape[-1])
        return out if self.o_bias is None else out + use(self.o_bias, x.dtype), kv

    def _keys_values(self, x: jax.Array, rows: Rows) -> KeyValues:
        k = self._project(x, self.k, self.k_bias, self.k_norm)
        return KeyValues(rotate(k, rows.rope), self._project(x, self.v, self.v_bias, None))

    def _project(self, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, norm: RMSNorm | None) -> jax.Array:
        """x [batch, n, width] -> queries, keys or values [batch, n, heads, head_dim], not yet rotated."""
        out = _project(x, weight)
        if bias is not None:
            out = out + use(bias, x.dtype)
        if norm is not None:
            whole = norm.weight.shape[-1] != out.shape[-1]
            out = norm(out.reshape(*out.shape[:2], -1)).reshape(out.shape) if whole else norm(out)
        return jnp.clip(out, -self.clip_qkv, self.clip_qkv) if self.clip_qkv else out


def replaced(old: KeyValues, own: KeyValues, where: Selection) -> KeyValues:
    """`old` with the keys and values at the valid slots of `where` taken from `own`."""

    def one(old: jax.Array, own: jax.Array) -> jax.Array:
        kept = take_rows(old, where.indices)
        return set_rows(old, where.indices, jnp.where(where.valid[:, :, None, None], own.astype(old.dtype), kept))

    return KeyValues(one(old.k, own.k), one(old.v, own.v))


def _project(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x [batch, n, width] -> [batch, n, heads, head_dim]."""
    w = use(weight, x.dtype)
    out = (x @ w.reshape(w.shape[0], -1)).reshape(*x.shape[:2], *w.shape[1:])
    return constrain(out, "batch", "seq", "heads", None)
