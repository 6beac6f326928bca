"""The layers of a decoder between embedding and output head: plain, recursive or routed by Mixture-of-Recursions."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.attention import AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.decoder import DecoderLayer
from adaptive.layers.moe.base import Context, RoutedLayer
from adaptive.layers.norm import RMSNorm
from adaptive.layers.remat import Remat
from adaptive.layers.rope import rope_at
from adaptive.layers.router import EXPANSION, Router
from adaptive.layers.site import Buffer, Site
from adaptive.models import recursion
from adaptive.models.config import TransformerConfig
from adaptive.models.forward import ROUTED, Forward, expert_losses
from adaptive.routing.losses import updated_bias
from adaptive.routing.types import AuxLosses, Output, Selection

Selecting = Literal["topk", "threshold"]


class Cache(NamedTuple):
    """What generation remembers.

    length       i32[batch]: positions of each row so far
    first, last  KeyValues [batch, max_length, kv_heads, head_dim] of the layers outside the recursion, or None
    block        per recursion: KeyValues [layers, batch, max_length, kv_heads, head_dim]
    active       bool[recursions, batch, max_length]: positions that took each recursion
    """

    length: jax.Array
    first: KeyValues | None
    block: tuple[KeyValues, ...]
    last: KeyValues | None
    active: jax.Array

    def batch_axes(self) -> "Cache":
        """The same tree with the number of the axis of rows in the place of every array."""
        of = lambda tree, axis: jax.tree.map(lambda _: axis, tree)  # noqa: E731
        return Cache(0, of(self.first, 0), of(self.block, 1), of(self.last, 0), 1)  # type: ignore[arg-type]


class Backbone(nnx.Module):
    """Layers whose middle may be a shared, routed block (MoR paper, section 2), and the norm behind them.

    Parameters are float32; `dtype` is what the layers compute in. `unroll` unrolls the scan over layers.
    """

    def __init__(self, config: TransformerConfig, *, keys: Iterator[jax.Array], dtype: Any, remat: Remat, unroll: bool):
        """keys: at least 4 + 2 * recursions of them."""
        self.config, self.dtype, self.remat, self.unroll = config, jnp.dtype(dtype), remat, unroll
        c, r = config, config.router
        self.first = self._layer(next(keys), (0,)) if c.unique_ends else None
        dense = c.moe.dense_layers if c.moe.router != "none" else ()
        inside = [i for i in range(c.block_size) if i not in dense]
        self.block = self._layer(next(keys), [c.unique_ends + i for i in inside], self._stack(len(inside)))
        self.last = self._layer(next(keys), (c.num_layers - 1,)) if c.unique_ends else None
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        routers, choices = {"none": (0, 0), "expert_choice": (c.recursions, 1), "token_choice": (1, c.recursions)}[
            r.kind
        ]
        self.routers = nnx.List([self._router(choices, r.temperature, next(keys)) for _ in range(routers)])
        auxiliary = routers if r.kind == "expert_choice" and r.sampling == "aux_router" else 0
        # The temperature is the main router's alone (released code, expert_choice_router.py).
        self.aux_routers = nnx.List([self._router(choices, 1.0, next(keys)) for _ in range(auxiliary)])
        loss_free = r.kind == "token_choice" and r.balancing == "loss_free"
        self.router_bias = Buffer(jnp.zeros(c.recursions)) if loss_free else None
        # Dense layers between routed ones; a vanilla model alone has them.
        self.dense = self._layer(next(keys), dense, (len(dense),), moe=False) if dense else None

    def apply(
        self,
        x: jax.Array,
        positions: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
        deterministic: bool = True,
        selection: Selecting = "topk",
        step: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """One forward pass without logits over the vectors x [batch, n, width].

        positions  i32[batch, n]   for the rotary embedding
        valid      bool[batch, n]  positions that exist, the first of each row, of which capacities are shares; None:
                                   all, or those of a segment above 0
        others     as in Transformer
        """
        rows = self._rows(positions, segment_ids)
        forward = self._forward(Context(selection=selection, training=not deterministic, key=key))
        if valid is not None:
            rows = rows._replace(segments=_within(rows.segments, valid))
        if self.first is not None:
            x, _ = forward.one("first", self.first, x, rows)
        exists = rows.present()
        counts = None if valid is None else valid.sum(1, dtype=jnp.int32)
        step = None if deterministic else step
        routed = self._recur(forward, x, rows, selection, exists=exists, counts=counts, step=step, key=key)
        x = routed.x
        if self.last is not None:
            x, _ = forward.one("last", self.last, x, rows)
        return self._output(forward, x, routed)

    def next_buffers(self, sums: dict[str, Any]) -> Any:
        """The buffers after a training step whose micro-batches' `Trace.sums` add up to `sums`."""
        model = nnx.clone(self)  # modules are updated in place, and the caller may keep the old buffers
        model.update_buffers(sums)
        return nnx.state(model, Buffer)

    def update_buffers(self, sums: dict[str, Any]) -> None:
        """As `next_buffers`, in place."""
        if self.router_bias is not None:
            rate = self.config.router.bias_update_rate
            self.router_bias[...] = updated_bias(self.router_bias[...], sums["depth"], rate)
        for part in ROUTED:
            layer = getattr(self, part)
            if layer is not None and isinstance(layer.feed_forward, RoutedLayer):
                layer.feed_forward.update(sums[part])

    def experts(self) -> RoutedLayer | None:
        """A routed feed-forward of the model, all of whose kind are alike; None where all are dense."""
        return self.block.feed_forward if isinstance(self.block.feed_forward, RoutedLayer) else None

    def selections(self) -> tuple[Selecting, ...]:
        """The ways of selecting that differ and that this model can evaluate: as it trains, and as it generates."""
        experts = self.experts()
        if experts is not None and experts.refuse_generation():
            return ("topk",)
        differ = self.config.router.kind == "expert_choice" or (experts is not None and not experts.selects_alike())
        return ("topk", "threshold") if differ else ("topk",)

    def refuse_generation(self) -> str:
        """Why generation cannot run; empty where it can."""
        c, experts = self.config, self.experts()
        if c.sharing == "middle_sequence" or (c.sharing == "sequence" and self._looped_inside):
            return "generation with a cache needs a contiguous block: sharing=cycle or middle_cycle"
        return "" if experts is None else experts.refuse_generation()

    # Generation

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` positions."""
        c = self.config
        shape = (batch, max_length, c.num_kv_heads, c.head_dim)

        def empty(*lead: int) -> KeyValues:
            return KeyValues(jnp.zeros((*lead, *shape), self.dtype), jnp.zeros((*lead, *shape), self.dtype))

        ends = empty() if c.unique_ends else None
        block = tuple(empty(c.block_size) for _ in range(1 if c.kv == "shared" else c.recursions))
        active = jnp.zeros((c.recursions, batch, max_length), bool)
        return Cache(jnp.zeros(batch, jnp.int32), ends, block, ends, active)

    def extend(self, x: jax.Array, cache: Cache, valid: jax.Array | None = None) -> tuple[Output, Cache]:
        """Appends vectors x [batch, n, width] to the cache; routed models decide causally (`selection="threshold"`).

        valid  bool[batch, n]: positions that exist, the first of each row; None: all. The cache needs room for all n
        """
        if reason := self.refuse_generation():
            raise RecipeError(reason)
        batch, n = x.shape[:2]
        where = cache.length[:, None] + jnp.arange(n, dtype=jnp.int32)
        rows = self._rows(where, None)._replace(index=where)
        taken = jnp.ones((batch, n), bool) if valid is None else valid
        own = Selection(where, taken.astype(jnp.float32), taken)
        index = jnp.broadcast_to(jnp.arange(cache.active.shape[-1], dtype=jnp.int32), cache.active.shape[1:])
        keys = Rows(rows.rope, index)
        forward = self._forward(Context(selection="threshold"))
        first = last = None
        if self.first is not None:
            assert cache.first is not None
            x, first = forward.one("first", self.first, x, rows, Memory(cache.first, keys, own))
        block = forward.block(self.block, self.dense)
        steps = recursion.CachedSteps(block, self.config, list(cache.block), cache.active, own)
        routed = self._recur(forward, x, rows, "threshold", steps=steps, exists=valid)
        x = routed.x
        if self.last is not None:
            assert cache.last is not None
            x, last = forward.one("last", self.last, x, rows, Memory(cache.last, keys, own))
        length = cache.length + taken.sum(1, dtype=jnp.int32)
        return self._output(forward, x, routed), Cache(length, first, tuple(steps.caches), last, steps.active)

    # Parts

    def _forward(self, context: Context) -> Forward:
        return Forward(self.config, context, self.dtype, self.remat, self.unroll)

    def _output(self, forward: Forward, x: jax.Array, routed: recursion.Routed) -> Output:
        experts, aux = forward.experts(), AuxLosses(routed.aux)
        layer = self.experts()
        if layer is not None:
            aux |= expert_losses(experts, layer)
        return Output(self.norm(x), None, aux, routed.trace._replace(experts=experts))

    def _recur(
        self,
        forward: Forward,
        x: jax.Array,
        rows: Rows,
        selection: Literal["topk", "threshold"],
        *,
        steps: recursion.Step | None = None,
        exists: jax.Array | None = None,
        counts: jax.Array | None = None,
        step: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> recursion.Routed:
        c = self.config
        if c.router.kind == "none" and self._looped_inside:
            x = forward.repeated_in_place(self.block, x, rows)
            return recursion.all_tokens(lambda r, x, rows, selection: x, c, x, rows)
        if steps is None:
            steps = recursion.Steps(forward.block(self.block, self.dense), c, rows)
        bias = None if self.router_bias is None else self.router_bias[...]
        routers = recursion.Routers(list(self.routers), list(self.aux_routers), bias)
        if c.router.kind == "token_choice":
            exact = selection == "threshold"
            return recursion.token_choice_depths(
                steps, c, routers, x, rows, exists=exists, counts=counts, step=step, key=key, exact=exact
            )
        if c.router.kind == "expert_choice" and selection == "threshold":
            return recursion.expert_choice_causal(steps, c, routers, x, rows, exists=exists)
        if c.router.kind == "expert_choice":
            return recursion.expert_choice_top(
                steps, c, routers, x, rows, exists=exists, counts=counts, step=step, key=key
            )
        return recursion.all_tokens(steps, c, x, rows)

    @property
    def _looped_inside(self) -> bool:
        """Whether each layer repeats in place (sequence sharing) rather than the block as a whole."""
        return self.config.recursions > 1 and self.config.sharing in ("sequence", "middle_sequence")

    def _stack(self, layers: int) -> tuple[int, ...]:
        c = self.config
        if c.share_parameters or c.recursions == 1:
            return (layers,)
        return (layers, c.recursions) if self._looped_inside else (c.recursions, layers)

    def _layer(
        self, key: jax.Array, numbers: Sequence[int], stack: tuple[int, ...] = (), *, moe: bool = True
    ) -> DecoderLayer:
        """numbers: of its layers in the unrolled network."""
        c = self.config
        uses = c.recursions if stack and c.recursions > 1 and c.share_parameters else 0
        return DecoderLayer(
            Site(c.hidden_size, c.init_std, stack, uses, tuple(numbers), c.num_layers, c.norm_eps),
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            feed_forward=c.intermediate_size,
            norm_eps=c.norm_eps,
            key=key,
            attention=AttentionOptions(c.attention_bias, c.qk_norm, c.clip_qkv, c.attention_window),
            moe=c.moe if moe and c.moe.router != "none" else None,
        )

    def _router(self, choices: int, temperature: float, key: jax.Array) -> Router:
        c, r = self.config, self.config.router
        return Router(
            c.hidden_size,
            choices,
            expansion=EXPANSION[r.network],
            temperature=temperature,
            std=c.init_std,
            key=key,
        )

    def _rows(self, positions: jax.Array, segment_ids: jax.Array | None) -> Rows:
        index = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
        return Rows(rope_at(positions, self.config.head_dim, self.config.rope_theta), index, segment_ids)


def _within(segments: jax.Array | None, valid: jax.Array) -> jax.Array:
    """Documents i32[batch, n], with 0, which is none, at positions that do not exist."""
    return valid.astype(jnp.int32) if segments is None else jnp.where(valid, segments, 0)
