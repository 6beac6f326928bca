"""Grouped-query attention among a set of positions, with keys that may come from elsewhere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.linear import normal_param, use
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


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, no biases (Llama)."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        std: float,
        key: jax.Array,
        stack: tuple[int, ...] = (),
    ):
        q, k, v, o = jax.random.split(key, 4)
        projection = ("width", "heads", None)
        self.q = normal_param(q, (width, heads, head_dim), projection, std, stack)
        self.k = normal_param(k, (width, kv_heads, head_dim), projection, std, stack)
        self.v = normal_param(v, (width, kv_heads, head_dim), projection, std, stack)
        self.o = normal_param(o, (heads, head_dim, width), ("heads", None, "width"), std, stack)

    def __call__(self, x: jax.Array, rows: Rows, memory: Memory | None = None) -> tuple[jax.Array, KeyValues]:
        """x [batch, n, width] at `rows` -> (its update of the same shape, the keys and values it attended to)."""
        q = rotate(_project(x, self.q), rows.rope)
        if memory is None:
            kv, keys = self._keys_values(x, rows), rows
            q_index = k_index = None
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
        )
        o = use(self.o, x.dtype)
        return out.reshape(*out.shape[:2], -1) @ o.reshape(-1, o.shape[-1]), kv

    def _keys_values(self, x: jax.Array, rows: Rows) -> KeyValues:
        return KeyValues(rotate(_project(x, self.k), rows.rope), _project(x, self.v))


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
