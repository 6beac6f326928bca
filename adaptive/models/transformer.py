"""Vanilla, recursive and Mixture-of-Recursions decoders: one module, told apart by their configuration."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.attention import AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.decoder import DecoderLayer
from adaptive.layers.linear import normal_param, use
from adaptive.layers.moe.base import Context, RoutedLayer
from adaptive.layers.norm import RMSNorm
from adaptive.layers.rope import rope_at
from adaptive.layers.router import EXPANSION, Router
from adaptive.layers.site import Buffer, Site
from adaptive.models import recursion
from adaptive.models.config import TransformerConfig
from adaptive.layers.remat import Remat
from adaptive.models.forward import ROUTED, Forward, expert_losses
from adaptive.parallel.rules import constrain, gathered
from adaptive.routing.losses import updated_bias
from adaptive.routing.types import AuxLosses, Output


class Cache(NamedTuple):
    """What generation remembers of `length` positions.

    first, last  KeyValues [batch, max_length, kv_heads, head_dim] of the layers outside the recursion, or None
    block        per recursion: KeyValues [layers, batch, max_length, kv_heads, head_dim]
    active       bool[recursions, batch, max_length]: positions that took each recursion
    """

    length: jax.Array
    first: KeyValues | None
    block: tuple[KeyValues, ...]
    last: KeyValues | None
    active: jax.Array


class Transformer(nnx.Module):
    """A Llama-style decoder (MoR paper, section 3.1) whose middle layers may be a shared, routed block (section 2).

    Call it with tokens; `init_cache`, `prefill` and `decode_step` generate. Parameters are float32; `dtype` is what the
    layers compute in. `unroll` unrolls the scan over layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        key: jax.Array,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: Remat = "none",
        unroll: bool = False,
    ):
        config.validate()
        self.config, self.dtype, self.remat, self.unroll = config, jnp.dtype(dtype), remat, unroll
        c, r = config, config.router
        keys = iter(jax.random.split(key, 6 + 2 * c.recursions))
        self.embedding = normal_param(next(keys), (c.vocab_size, c.hidden_size), ("vocab", "width"), c.init_std)
        head = (c.vocab_size, c.hidden_size), ("vocab", "width"), c.init_std
        self.head = None if c.tie_embeddings else normal_param(next(keys), *head)
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

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        selection: Literal["topk", "threshold"] = "topk",
        step: jax.Array | None = None,
        key: jax.Array | None = None,
        logits: bool = True,
    ) -> Output:
        """One forward pass.

        tokens         i32[batch, seq]
        positions      i32[batch, seq]  for the rotary embedding; None: 0..seq-1
        segment_ids    i32[batch, seq]  documents, which attention does not leave; 0 is padding; None: one document
        deterministic  False in training: warm-ups, which need `step`, apply
        selection      how expert choice selects: "topk" over the whole sequence, as it trains, sees the future;
                       "threshold" decides token by token and is what sampling does
        step           i32[] training step, while a warm-up lasts; None: no warm-up
        key            PRNG key of the random-router ablation
        logits         False leaves them out, for a loss that computes them in chunks from `hidden` and `head_weight`
        """
        rows = self._rows(tokens, positions, segment_ids)
        forward = self._forward(Context(selection=selection, training=not deterministic, key=key))
        x = self._embed(tokens)
        if self.first is not None:
            x, _ = forward.one("first", self.first, x, rows)
        exists = None if segment_ids is None else segment_ids > 0
        routed = self._recur(forward, x, rows, selection, exists=exists, step=None if deterministic else step, key=key)
        x = routed.x
        if self.last is not None:
            x, _ = forward.one("last", self.last, x, rows)
        return self._output(forward, x, routed, logits)

    def head_weight(self) -> jax.Array:
        """The output matrix [vocab, width], in float32."""
        return (self.embedding if self.head is None else self.head)[...]

    def next_buffers(self, sums: dict[str, Any]) -> Any:
        """The model's buffers after a training step whose micro-batches' `Trace.sums` add up to `sums`."""
        model = nnx.clone(self)  # modules are updated in place, and the caller may keep the old buffers
        if model.router_bias is not None:
            rate = self.config.router.bias_update_rate
            model.router_bias[...] = updated_bias(model.router_bias[...], sums["depth"], rate)
        for part in ROUTED:
            layer = getattr(model, part)
            if layer is not None and isinstance(layer.feed_forward, RoutedLayer):
                layer.feed_forward.update(sums[part])
        return nnx.state(model, Buffer)

    def experts(self) -> RoutedLayer | None:
        """A routed feed-forward of the model, all of whose kind are alike; None where all are dense."""
        return self.block.feed_forward if isinstance(self.block.feed_forward, RoutedLayer) else None

    def selections(self) -> tuple[Literal["topk", "threshold"], ...]:
        """The ways of selecting that differ and that this model can evaluate: as it trains, and as it generates."""
        experts = self.experts()
        if experts is not None and experts.refuse_generation():
            return ("topk",)
        differ = self.config.router.kind == "expert_choice" or (experts is not None and not experts.selects_alike())
        return ("topk", "threshold") if differ else ("topk",)

    def refuse_generation(self) -> str:
        """Why `prefill` and `decode_step` cannot run; empty where they can."""
        c, experts = self.config, self.experts()
        if c.sharing == "middle_sequence" or (c.sharing == "sequence" and self._looped_inside):
            return "generation with a cache needs a contiguous block: sharing=cycle or middle_cycle"
        return "" if experts is None else experts.refuse_generation()

    # Generation

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        c = self.config
        shape = (batch, max_length, c.num_kv_heads, c.head_dim)

        def empty(*lead: int) -> KeyValues:
            return KeyValues(jnp.zeros((*lead, *shape), self.dtype), jnp.zeros((*lead, *shape), self.dtype))

        ends = empty() if c.unique_ends else None
        block = tuple(empty(c.block_size) for _ in range(1 if c.kv == "shared" else c.recursions))
        active = jnp.zeros((c.recursions, batch, max_length), bool)
        return Cache(jnp.zeros((), jnp.int32), ends, block, ends, active)

    def prefill(self, tokens: jax.Array, cache: Cache) -> tuple[Output, Cache]:
        """Appends tokens i32[batch, n] to the cache; routed models decide causally (`selection="threshold"`)."""
        if reason := self.refuse_generation():
            raise RecipeError(reason)
        batch, n = tokens.shape
        where = jnp.broadcast_to(cache.length + jnp.arange(n, dtype=jnp.int32), (batch, n))
        rows = self._rows(tokens, where, None)._replace(index=where)
        everyone = recursion.Selection(where, jnp.ones((batch, n)), jnp.ones((batch, n), bool))
        index = jnp.broadcast_to(jnp.arange(cache.active.shape[-1], dtype=jnp.int32), cache.active.shape[1:])
        keys = Rows(rows.rope, index)
        forward = self._forward(Context(selection="threshold"))
        x = self._embed(tokens)
        first = last = None
        if self.first is not None:
            assert cache.first is not None
            x, first = forward.one("first", self.first, x, rows, Memory(cache.first, keys, everyone))
        block = forward.block(self.block, self.dense)
        steps = recursion.CachedSteps(block, self.config, list(cache.block), cache.active, where)
        routed = self._recur(forward, x, rows, "threshold", steps=steps)
        x = routed.x
        if self.last is not None:
            assert cache.last is not None
            x, last = forward.one("last", self.last, x, rows, Memory(cache.last, keys, everyone))
        after = Cache(cache.length + n, first, tuple(steps.caches), last, steps.active)
        return self._output(forward, x, routed, True), after

    def decode_step(self, token: jax.Array, cache: Cache) -> tuple[Output, Cache]:
        """Appends one token i32[batch] to each sequence; logits f32[batch, 1, vocab] of the next."""
        return self.prefill(token[:, None], cache)

    # Parts

    def _forward(self, context: Context) -> Forward:
        return Forward(self.config, context, self.dtype, self.remat, self.unroll)

    def _output(self, forward: Forward, x: jax.Array, routed: recursion.Routed, logits: bool) -> Output:
        hidden, experts, aux = self.norm(x), forward.experts(), AuxLosses(routed.aux)
        layer = self.experts()
        if layer is not None:
            aux |= expert_losses(experts, layer)
        trace = routed.trace._replace(experts=experts)
        return Output(hidden, self._logits(hidden) if logits else None, aux, trace)

    def _recur(
        self,
        forward: Forward,
        x: jax.Array,
        rows: Rows,
        selection: Literal["topk", "threshold"],
        *,
        steps: recursion.Step | None = None,
        exists: jax.Array | None = None,
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
            return recursion.token_choice_depths(
                steps, c, routers, x, rows, exists=exists, step=step, key=key, exact=selection == "threshold"
            )
        if c.router.kind == "expert_choice" and selection == "threshold":
            return recursion.expert_choice_causal(steps, c, routers, x, rows, exists=exists)
        if c.router.kind == "expert_choice":
            return recursion.expert_choice_top(
                steps, c, routers, x, rows, exists=exists, step=step, key=key
            )  # fmt: skip
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

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = gathered(self.embedding[...], ("vocab", "width"), self.dtype)
        x = table[tokens]
        if (padding := self.config.padding_token) >= 0:
            x = jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)
        return constrain(x, "batch", "seq", None)

    def _rows(self, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None) -> Rows:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rope = rope_at(index if positions is None else positions, self.config.head_dim, self.config.rope_theta)
        return Rows(rope, index, segment_ids)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        weight = use(self.embedding if self.head is None else self.head, hidden.dtype)
        return jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)


def build_model(
    config: TransformerConfig,
    *,
    key: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: Remat = "none",
    unroll: bool = False,
) -> Transformer:
    """The model that `config` describes, parameters drawn from `key`."""
    return Transformer(config, key=key, dtype=dtype, remat=remat, unroll=unroll)
