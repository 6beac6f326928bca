"""Grouped-query attention with rotary positions, among a set of positions and what a state holds of earlier ones."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost, Span
from adaptive.layers.keys_values import KeyValues, counts, empty, first, reached, slots_of, written
from adaptive.layers.linear import projected, times, use
from adaptive.layers.mixers import Mixer, MixerModule
from adaptive.layers.norm import RMSNorm
from adaptive.layers.reach import seen_by
from adaptive.layers.rope import Rotary, rotate
from adaptive.layers.rope_scalings import Scaling
from adaptive.layers.site import Site, normal_param, param
from adaptive.layers.state import Within
from adaptive.layers.where import Where
from adaptive.parallel.context import attention
from adaptive.routing.chunks import numbered
from adaptive.routing.rows import take_rows
from adaptive.settings import divisors, ranged, since, spelt
from kernels_pallas.attention import Places

_NOWHERE = jnp.iinfo(jnp.int32).max  # behind every place in a row


@dataclasses.dataclass(frozen=True)
class Settings(Mixer):
    """Attention as in Llama; all behind `rope_theta` is what its relatives add."""

    both_ways: ClassVar[bool] = True

    heads: int = ranged(4, least=1)
    kv_heads: int = ranged(0, least=0)  # heads of keys and values, which divide the heads; 0: as many as heads
    head_dim: int = ranged(32, least=2)
    rotary_dim: int = ranged(-1, least=-1)  # channels of each head, the first ones, that rotate; -1: all
    rope_theta: float = ranged(10_000.0, above=0)
    rope_scaling: Scaling | None = since(None, before=None)  # how frequencies are changed for longer texts
    window: int = ranged(0, least=0)  # positions of the row that a query sees, its own the last (Mistral); 0: all
    # Of the projections of queries, keys and values (Qwen2), or of the output as well (GPT-2).
    bias: Literal["none", "qkv", "all"] = spelt("none", once={False: "none", True: "all"})
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of queries and keys, per head (Qwen3) or whole (OLMoE)
    clip_qkv: float = ranged(0.0, least=0)  # bound on the absolute value of queries, keys and values (OLMoE); 0: none
    scale: float = since(0.0, before=0.0, least=0)  # of scores (Gemma); 0: 1 / sqrt(head_dim)
    soft_cap: float = since(
        0.0, before=0.0, least=0
    )  # scores become cap * tanh(scores / cap) (Gemma 2); 0: as they are

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def rotated(self) -> int:
        """Channels of each head that rotate."""
        return self.head_dim if self.rotary_dim < 0 else self.rotary_dim

    def kernels(self) -> tuple[str, ...]:
        return ("attention",)

    def check(self, width: int, at: str) -> None:
        if self.heads % self.groups:
            fits = ", ".join(map(str, divisors(self.heads)))
            raise RecipeError(
                f"{at}.heads={self.heads} is not a multiple of {at}.kv_heads={self.groups}; kv_heads can be {fits}"
            )
        if self.rotary_dim < 0 and self.head_dim % 2:
            raise RecipeError(f"{at}.head_dim={self.head_dim}: rotary embeddings need an even head_dim")
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise RecipeError(
                f"{at}.rotary_dim={self.rotary_dim}: must be even and at most {at}.head_dim={self.head_dim}"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope_theta, f"{at}.rope_scaling")

    def unread(self) -> dict[str, str]:
        return {} if self.rotated else dict.fromkeys(("rope_theta", "rope_scaling"), "nothing rotates: rotary_dim=0")

    def rotary(self) -> tuple[Rotary, ...]:
        return (Rotary(self.rotated, self.rope_theta, self.rope_scaling),) if self.rotated else ()

    def parameters(self, width: int) -> int:
        heads, groups = self.heads * self.head_dim, self.groups * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "full": heads + groups}[self.qk_norm]
        biases = {"none": 0, "qkv": heads + 2 * groups, "all": heads + 2 * groups + width}[self.bias]
        return 2 * width * (heads + groups) + biases + norms

    def cost(self, width: int, span: Span) -> Cost:
        queries, keys, row, own_keys = span
        visible = (keys + 1) / 2  # a query among ascending positions sees on average half of the keys and itself
        if 0 < self.window < row:
            reach = self.window * keys / row
            visible = reach - reach * (reach - 1) / (2 * max(keys, 1))
        heads = self.heads * self.head_dim
        out = 2.0 * queries * width * heads
        return Cost(
            keys=keys,
            projections=2 * out + 4.0 * queries * width * own_keys * self.groups * self.head_dim,
            attention=4.0 * queries * keys * heads,  # two matmuls: scores, and values
            attention_useful=4.0 * queries * visible * heads,
            last=out,
        )

    def build(self, site: Site, key: jax.Array) -> "Attention":
        return Attention(self, site, key)


class Attention(MixerModule):
    """Queries at `where` read the keys of the same call or, with a state, those of the state with their own among them.

    A position's slot in the state is its place in the row, unless `where` says another.
    """

    in_place = True

    def __init__(self, settings: Settings, site: Site, key: jax.Array):
        s, width, stack = settings, site.width, site.stack
        q, k, v, o = jax.random.split(key, 4)
        inwards = ("width", "heads", None)
        self.q = normal_param(q, (width, s.heads, s.head_dim), inwards, site.std, stack)
        self.k = normal_param(k, (width, s.groups, s.head_dim), inwards, site.std, stack)
        self.v = normal_param(v, (width, s.groups, s.head_dim), inwards, site.std, stack)
        self.o = normal_param(o, (s.heads, s.head_dim, width), ("heads", None, "width"), site.writes_std, stack)

        def zeros(of: tuple[str, ...], shape: tuple[int, ...], *axes: str | None) -> nnx.Param | None:
            return param(jnp.zeros((*stack, *shape)), axes, stack=stack, role="bias") if s.bias in of else None

        self.q_bias = zeros(("qkv", "all"), (s.heads, s.head_dim), "heads", None)
        self.k_bias = zeros(("qkv", "all"), (s.groups, s.head_dim), "heads", None)
        self.v_bias = zeros(("qkv", "all"), (s.groups, s.head_dim), "heads", None)
        self.o_bias = zeros(("all",), (width,), None)
        whole = s.heads * s.head_dim, s.groups * s.head_dim
        widths = {"none": (0, 0), "head": (s.head_dim, s.head_dim), "full": whole}[s.qk_norm]
        self.q_norm, self.k_norm = (RMSNorm(w, site.norm_eps, stack) if w else None for w in widths)
        self.settings = settings

    def __call__(
        self, x: jax.Array, where: Where, call: Call, state: KeyValues | Within | None
    ) -> tuple[jax.Array, KeyValues | Within | None, Told]:
        s = self.settings
        rope = [where.rope(kind) for kind in s.rotary()]

        def rotated(own: jax.Array) -> jax.Array:
            return rotate(own, rope[0]) if rope else own

        q = rotated(self._project(x, self.q, self.q_bias, self.q_norm))
        if s.scale:
            q = q * (s.scale * s.head_dim**0.5)
        if state is None or call.writes:
            k = rotated(self._project(x, self.k, self.k_bias, self.k_norm))
            own = KeyValues(k, self._project(x, self.v, self.v_bias, None), where.index, where.segments)
            after: Any = own if state is None else written(state, own, where)
        else:
            after = state
        causal = call.sees == "past" and where.reach is None
        how = {"window": s.window, "causal": causal, "soft_cap": s.soft_cap}
        if state is not None:
            out = _read(q, after, where, **how)
        elif s.window or where.reach is not None:
            places = Places(own.index, own.index, own.segments, own.segments, where.exists, *seen_blocks(where))
            out = attention(q, own.k, own.v, places, **how)
        else:  # order alone tells what is earlier, but not how much earlier
            out = attention(q, own.k, own.v, Places(None, None, own.segments, own.segments, where.exists), **how)
        o = use(self.o, x.dtype)
        out = times(out.reshape(*out.shape[:2], -1), o.reshape(-1, o.shape[-1]))
        if self.o_bias is not None:
            out = out + use(self.o_bias, x.dtype)
        if state is None and call.keep and where.exists is not None:
            after = own._replace(index=jnp.where(where.exists, own.index, -1))
        told = Told()
        if call.counts and not call.training:
            read = None if state is None else slots_of(after)
            told = Told(stats=attended(where, s.window, call.sees, read))
        return out, after if call.keep or state is not None else None, told

    def empty(self, rows: int, slots: int, dtype: Any) -> KeyValues:
        return empty(rows, slots, self.settings.groups, self.settings.head_dim, dtype)

    def _project(self, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, norm: RMSNorm | None) -> jax.Array:
        """x [rows, n, width] -> queries, keys or values [rows, n, heads, head_dim], not yet rotated."""
        out, clip = projected(x, weight), self.settings.clip_qkv
        if bias is not None:
            out = out + use(bias, x.dtype)
        if norm is not None:
            whole = norm.weight.shape[-1] != out.shape[-1]
            out = norm(out.reshape(*out.shape[:2], -1)).reshape(out.shape) if whole else norm(out)
        return jnp.clip(out, -clip, clip) if clip else out


def _read(q: jax.Array, state: KeyValues | Within, where: Where, **how: Any) -> jax.Array:
    """Attention of queries at `where` over what a state holds, by slots."""
    sizes = counts(state, q.shape[1]) if how["causal"] else counts(state, q.shape[1])[-1:]

    def over(size: int) -> Callable[..., jax.Array]:
        def form(q: jax.Array, state: KeyValues | Within, where: Where) -> jax.Array:
            keys = first(state, size)
            there = keys.index >= 0
            # Empty slots follow all others, which ascend.
            index = None if where.slots is None else jnp.where(there, keys.index, _NOWHERE)
            places = Places(where.index, index, where.segments, keys.segments, there, *seen_blocks(where))
            return attention(q, keys.k, keys.v, places, **how)

        return form

    if len(sizes) == 1:
        return over(sizes[0])(q, state, where)
    enough = jnp.searchsorted(jnp.array(sizes), reached(state, where))
    return jax.lax.switch(enough, [over(size) for size in sizes], q, state, where)


def seen_blocks(where: Where) -> tuple[jax.Array, ...]:
    """The last arguments of `Places`, where positions say themselves what they see."""
    return () if where.reach is None else where.reach[1:]


def attended(where: Where, window: int, sees: str, read: Where | None = None) -> dict[str, jax.Array]:
    """f32[] each: queries that exist, and the pairs of a query and a key that they read.

    read  all positions of the rows, where keys are theirs; None: keys are those of the queries' own positions
    """
    there = _there(where)
    held = where if read is None else read
    if where.reach is not None:
        keys = seen_by(where.reach, held.index, _there(held))
    else:
        keys = _seen(held, window, sees)
        keys = keys if read is None else take_rows(keys, where.index)
    return {"queries": there.sum(), "keys": (keys * there).sum()}


def _seen(where: Where, window: int, sees: str) -> jax.Array:
    """f32[rows, n]: how many of these positions each of them sees. By counting, so that nothing of queries times keys
    exists."""
    there = _there(where)
    total = jnp.cumsum(there, axis=1)
    place = jnp.broadcast_to(jnp.arange(where.shape[1], dtype=jnp.int32), where.shape)
    first = place - numbered(where.shape, where.segments)
    if window:
        since = jax.vmap(lambda index: jnp.searchsorted(index, index - window, side="right"))(where.index)
        first = jnp.maximum(first, since.astype(jnp.int32))
    before = jnp.where(first > 0, jnp.take_along_axis(total, jnp.maximum(first - 1, 0), axis=1), 0.0)
    if sees == "past":
        return total - before
    end = jnp.full(where.shape, where.shape[1] - 1, jnp.int32)
    last = end if where.segments is None else jax.vmap(_last_of)(where.segments)
    if window:
        until = jax.vmap(lambda index: jnp.searchsorted(index, index + window))(where.index)
        last = jnp.minimum(last, until.astype(jnp.int32) - 1)
    return jnp.take_along_axis(total, last, axis=1) - before


def _there(where: Where) -> jax.Array:
    """f32[rows, n]: 1 where a position holds a token."""
    present = where.present()
    return jnp.ones(where.shape, jnp.float32) if present is None else present.astype(jnp.float32)


def _last_of(segments: jax.Array) -> jax.Array:
    """i32[n]: the last position of each position's document."""
    n = segments.shape[0]
    ends = jnp.append(segments[1:] != segments[:-1], True)
    place = jnp.arange(n, dtype=jnp.int32)
    return jax.lax.cummin(jnp.where(ends, place, n - 1), reverse=True)
