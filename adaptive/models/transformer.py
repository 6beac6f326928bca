"""Vanilla, recursive and Mixture-of-Recursions decoders: one module, told apart by their configuration."""

import jax
import jax.numpy as jnp

from adaptive.layers.linear import normal_param, use
from adaptive.layers.remat import Remat
from adaptive.models.backbone import Backbone, Cache, Selecting
from adaptive.models.config import TransformerConfig
from adaptive.parallel.rules import constrain, gathered
from adaptive.routing.types import Output


class Transformer(Backbone):
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
        keys = iter(jax.random.split(key, 6 + 2 * config.recursions))
        table = (config.vocab_size, config.hidden_size), ("vocab", "width"), config.init_std
        self.embedding = normal_param(next(keys), *table)
        self.head = None if config.tie_embeddings else normal_param(next(keys), *table)
        super().__init__(config, keys=keys, dtype=dtype, remat=remat, unroll=unroll)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        selection: Selecting = "topk",
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
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out = self.apply(
            self._embed(tokens),
            positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
            selection=selection,
            step=step,
            key=key,
        )
        return out._replace(logits=self._logits(out.hidden)) if logits else out

    def head_weight(self) -> jax.Array:
        """The output matrix [vocab, width], in float32."""
        return (self.embedding if self.head is None else self.head)[...]

    def prefill(self, tokens: jax.Array, cache: Cache, valid: jax.Array | None = None) -> tuple[Output, Cache]:
        """Appends tokens i32[batch, n] to the cache; routed models decide causally (`selection="threshold"`).

        valid  bool[batch, n]: the tokens that exist, the first of each row; None: all. The cache needs room for all n
        """
        out, cache = self.extend(self._embed(tokens), cache, valid)
        return out._replace(logits=self._logits(out.hidden)), cache

    def decode_step(self, token: jax.Array, cache: Cache) -> tuple[Output, Cache]:
        """Appends one token i32[batch] to each sequence; logits f32[batch, 1, vocab] of the next."""
        return self.prefill(token[:, None], cache)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = gathered(self.embedding[...], ("vocab", "width"), self.dtype)
        x = table[tokens]
        if (padding := self.config.padding_token) >= 0:
            x = jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)
        return constrain(x, "batch", "seq", None)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        weight = use(self.embedding if self.head is None else self.head, hidden.dtype)
        return jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)
