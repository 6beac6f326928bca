"""Vanilla, recursive and Mixture-of-Recursions decoders: one module, told apart by their configuration."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.attention import AttentionOptions, KeyValues, Memory, Rows
from adaptive.layers.decoder import DecoderLayer
from adaptive.layers.linear import normal_param, use
from adaptive.layers.norm import RMSNorm
from adaptive.layers.rope import rope_at
from adaptive.layers.router import EXPANSION, Router
from adaptive.models import recursion
from adaptive.models.config import TransformerConfig
from adaptive.parallel.rules import constrain, gathered
from adaptive.routing.losses import updated_bias
from adaptive.routing.types import Output

Remat = Literal["none", "layer", "dots"]


class Buffer(nnx.Variable):
    """State of a model that no gradient trains (the bias of loss-free balancing)."""


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
        keys = iter(jax.random.split(key, 5 + 2 * c.recursions))
        self.embedding = normal_param(next(keys), (c.vocab_size, c.hidden_size), ("vocab", "width"), c.init_std)
        head = (c.vocab_size, c.hidden_size), ("vocab", "width"), c.init_std
        self.head = None if c.tie_embeddings else normal_param(next(keys), *head)
        self.first = self._layer(next(keys)) if c.unique_ends else None
        self.block = self._layer(next(keys), self._stack())
        self.last = self._layer(next(keys)) if c.unique_ends else None
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
        x = self._embed(tokens)
        if self.first is not None:
            x, _ = self._one(self.first, x, rows)
        exists = None if segment_ids is None else segment_ids > 0
        steps = recursion.Steps(self._ready_block(), self.config, rows)
        routed = self._recur(
            steps, x, rows, selection, exists=exists, step=None if deterministic else step, key=key
        )  # fmt: skip
        x = routed.x
        if self.last is not None:
            x, _ = self._one(self.last, x, rows)
        hidden = self.norm(x)
        return Output(hidden, self._logits(hidden) if logits else None, routed.aux, routed.trace)

    def head_weight(self) -> jax.Array:
        """The output matrix [vocab, width], in float32."""
        return (self.embedding if self.head is None else self.head)[...]

    def next_buffers(self, load: jax.Array | None) -> Any:
        """The model's buffers after a training step whose tokens went to depths with shares `load` f32[recursions]."""
        buffers = nnx.state(self, Buffer)
        if self.router_bias is None or load is None:
            return buffers
        rate = self.config.router.bias_update_rate
        return jax.tree.map(lambda bias: updated_bias(bias, load, rate), buffers)

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
        if self.config.sharing == "middle_sequence" or (self.config.sharing == "sequence" and self._looped_inside):
            raise NotImplementedError("generation with a cache needs a contiguous block: sharing=cycle or middle_cycle")
        batch, n = tokens.shape
        where = jnp.broadcast_to(cache.length + jnp.arange(n, dtype=jnp.int32), (batch, n))
        rows = self._rows(tokens, where, None)._replace(index=where)
        everyone = recursion.Selection(where, jnp.ones((batch, n)), jnp.ones((batch, n), bool))
        index = jnp.broadcast_to(jnp.arange(cache.active.shape[-1], dtype=jnp.int32), cache.active.shape[1:])
        keys = Rows(rows.rope, index)
        x = self._embed(tokens)
        first = last = None
        if self.first is not None:
            assert cache.first is not None
            x, first = self._one(self.first, x, rows, Memory(cache.first, keys, everyone))
        steps = recursion.CachedSteps(self._ready_block(), self.config, list(cache.block), cache.active, where)
        routed = self._recur(steps, x, rows, "threshold")
        x = routed.x
        if self.last is not None:
            assert cache.last is not None
            x, last = self._one(self.last, x, rows, Memory(cache.last, keys, everyone))
        hidden = self.norm(x)
        after = Cache(cache.length + n, first, tuple(steps.caches), last, steps.active)
        return Output(hidden, self._logits(hidden), routed.aux, routed.trace), after

    def decode_step(self, token: jax.Array, cache: Cache) -> tuple[Output, Cache]:
        """Appends one token i32[batch] to each sequence; logits f32[batch, 1, vocab] of the next."""
        return self.prefill(token[:, None], cache)

    # Parts

    def _recur(
        self,
        steps: recursion.Step,
        x: jax.Array,
        rows: Rows,
        selection: Literal["topk", "threshold"],
        *,
        exists: jax.Array | None = None,
        step: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> recursion.Routed:
        c = self.config
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
        if self._looped_inside:
            x, _ = self._sequence(self._block_state(), x, rows)
            return recursion.all_tokens(lambda r, x, rows, selection: x, c, x, rows)
        return recursion.all_tokens(steps, c, x, rows)

    @property
    def _looped_inside(self) -> bool:
        """Whether each layer repeats in place (sequence sharing) rather than the block as a whole."""
        return self.config.recursions > 1 and self.config.sharing in ("sequence", "middle_sequence")

    def _stack(self) -> tuple[int, ...]:
        c = self.config
        if c.share_parameters or c.recursions == 1:
            return (c.block_size,)
        return (c.block_size, c.recursions) if self._looped_inside else (c.recursions, c.block_size)

    def _layer(self, key: jax.Array, stack: tuple[int, ...] = ()) -> DecoderLayer:
        c = self.config
        return DecoderLayer(
            c.hidden_size,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            feed_forward=c.intermediate_size,
            norm_eps=c.norm_eps,
            std=c.init_std,
            key=key,
            stack=stack,
            attention=AttentionOptions(c.attention_bias, c.qk_norm, c.clip_qkv, c.attention_window),
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

    def _one(
        self, layer: DecoderLayer, x: jax.Array, rows: Rows, memory: Memory | None = None
    ) -> tuple[jax.Array, KeyValues]:
        graphdef, state = nnx.split(layer)
        return self._checkpointed(lambda state, x, memory: nnx.merge(graphdef, state)(x, rows, memory))(
            state, x, memory
        )

    def _block_state(self) -> Any:
        """The block's parameters. A block used several times is gathered once, ahead of all its uses."""
        state = nnx.state(self.block)
        if self.config.recursions == 1:
            return state

        def ready(param: nnx.Variable) -> nnx.Variable:
            axes = param.get_metadata()["axes"]
            return param.replace(gathered(param[...], axes, self.dtype)) if "width" in axes else param

        return jax.tree.map(ready, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def _ready_block(self) -> recursion.Block:
        graphdef, state = nnx.graphdef(self.block), self._block_state()
        own = not self.config.share_parameters and self.config.recursions > 1

        def apply(r, x, rows, memory, *, keep):
            layers = jax.tree.map(lambda a: a[r], state) if own else state
            stacked = None if memory is None else memory.kv

            def body(x, scanned):
                layer, kv = scanned
                x, out = nnx.merge(graphdef, layer)(x, rows, None if memory is None else memory._replace(kv=kv))
                return x, out if keep else None

            return jax.lax.scan(self._checkpointed(body), x, (layers, stacked), unroll=self.unroll or 1)

        return apply

    def _sequence(self, state: Any, x: jax.Array, rows: Rows) -> tuple[jax.Array, None]:
        """Sequence sharing: each layer of the block runs `recursions` times before the next one does."""
        graphdef, c = nnx.graphdef(self.block), self.config

        def body(x, layer):
            first = None
            for r in range(c.recursions):
                own = layer if c.share_parameters else jax.tree.map(lambda a, r=r: a[r], layer)
                memory = None if first is None else Memory(first, rows)
                x, kv = nnx.merge(graphdef, own)(x, rows, memory)
                if c.kv == "shared":
                    first = kv
            return x, None

        return jax.lax.scan(self._checkpointed(body), x, state, unroll=self.unroll or 1)

    def _checkpointed(self, fn):
        match self.remat:
            case "none":
                return fn
            case "layer":
                return jax.checkpoint(fn)
            case "dots":
                return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


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
