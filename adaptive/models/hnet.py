"""Hierarchical networks: bytes are chunked where a router says, and the network inside sees chunks alone.

H-Net paper (arXiv 2507.07955), sections 2.1 to 2.3; released code, models/hnet.py and modules/dc.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.chunkers import Heard, make_chunker
from adaptive.layers.layout import Layout, height
from adaptive.layers.linear import normal_param, use
from adaptive.layers.moe.base import RoutedLayer
from adaptive.layers.remat import Remat
from adaptive.layers.site import Buffer
from adaptive.layers.stack import Places, Stack, State
from adaptive.models.backbone import Backbone, Cache, Selecting
from adaptive.models.config import TransformerConfig
from adaptive.models.hnet_config import HNetConfig
from adaptive.models.hnet_places import Level, inner_places, packed, shifted
from adaptive.models.hnet_rows import in_groups
from adaptive.models.hnet_trace import StageRecord, assemble
from adaptive.parallel.rules import batch_shards, constrain, gathered
from adaptive.parallel.shard import sharded
from adaptive.routing.boundaries import behind, dechunk, gather, merged, select_boundaries, straight_through
from adaptive.routing.chunks import begins, numbered
from adaptive.routing.types import AuxLosses, Output, Trace
from kernels_pallas.ema import ema


class StageState(NamedTuple):
    """What a chunking stage carries along its sequences.

    seen     i32[batch]         positions so far
    encoder, decoder            of the stacks
    last     [batch, width]     the encoder's output at the last position
    token    i32[batch]         the last byte; of the first stage alone
    value    f32[batch, width]  the moving average in the last chunk
    behind   f32[batch, width]  sum of the encoder's outputs behind the last boundary, where chunks are sums
    """

    seen: jax.Array
    encoder: State
    decoder: State
    last: jax.Array
    token: jax.Array
    value: jax.Array
    behind: jax.Array


class HNetCache(NamedTuple):
    """What generation remembers: every chunking stage's state, and of the innermost network its own and how many
    positions i32[batch] it has seen."""

    stages: tuple[StageState, ...]
    main: State | Cache
    seen: jax.Array


class Call(NamedTuple):
    """What one forward pass is about. limited: whether capacities hold; keep: whether states are kept."""

    selection: Selecting
    deterministic: bool
    step: jax.Array | None
    key: jax.Array | None
    limited: bool
    keep: bool
    rows: int = 0
    records: list[StageRecord] = []  # noqa: RUF012  # every call brings its own
    inner: list[Output] = []  # noqa: RUF012


class ChunkStage(nnx.Module):
    """One chunking stage: encoder, chunker, projected residual and decoder; `pad` widens its input."""

    def __init__(self, config: HNetConfig, stage: int, layout: Layout, stacks: Any, *, std: float, key: jax.Array):
        encoder, decoder, chunker, bias = jax.random.split(key, 4)
        width = config.shape(stage).width
        self.pad = _pad(config, stage)
        self.encoder: Stack = stacks(stage, layout.encoders[stage], encoder)
        self.decoder: Stack = stacks(stage, layout.decoders[stage], decoder)
        self.chunker = make_chunker(
            config.chunker(stage),
            width,
            target=config.target(stage),
            flip_temperature=config.flip_temperature,
            std=std,
            key=chunker,
        )
        self.residual = Residual(width, bias)


class Residual(nnx.Module):
    """The encoder's output on its way around the inner network, in float32. Its weight begins at zero, its bias where
    PyTorch begins a linear layer's, as in the release."""

    def __init__(self, width: int, key: jax.Array):
        self.weight = nnx.Param(jnp.zeros((width, width)), axes=("width", None))
        bound = width**-0.5
        self.bias = nnx.Param(jax.random.uniform(key, (width,), jnp.float32, -bound, bound), axes=(None,))

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., width] -> f32 of the same shape."""
        return h.astype(jnp.float32) @ use(self.weight, jnp.float32) + self.bias[...]


class HNet(nnx.Module):
    """A hierarchical network of any number of chunking stages around any network of the house.

    Call it with bytes; `init_cache`, `prefill` and `decode_step` generate, for rows of any lengths whose chunks begin
    at different times, without a limit on chunks. Parameters are float32; `dtype` is what layers compute in, but for
    chunkers, residual streams and moving averages, which are float32.
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
        self.config, self.hnet, self.dtype = config, config.hnet, jnp.dtype(dtype)
        layout = self.layout = config.hnet.parsed()
        keys = iter(jax.random.split(key, layout.stages + 3))
        outer, table = config.hnet.shape(0).width, ("vocab", "width")
        shape = config.vocab_size, outer
        self.embedding = normal_param(next(keys), shape, table, config.hnet.embedding_std)
        head = next(keys)
        self.head = None if config.tie_embeddings else normal_param(head, shape, table, config.init_std)

        def stack(stage: int, blocks: Any, key: jax.Array) -> Stack:
            # Residual additions are counted from the outside in (released code, HNet._init_weights).
            additions = sum(height(*layout.at(s)) for s in range(stage + 1))
            return Stack(
                blocks,
                config.hnet.shape(stage),
                std=config.init_std,
                out_std=config.init_std * additions**-0.5,
                key=key,
                eps=config.norm_eps,
                theta=config.rope_theta,
                dtype=self.dtype,
                remat=remat,
                unroll=unroll,
            )

        self.stages = nnx.List(
            [
                ChunkStage(config.hnet, s, layout, stack, std=config.init_std, key=next(keys))
                for s in range(layout.stages)
            ]
        )
        self.main_pad = _pad(config.hnet, layout.stages)
        self.main: Stack | Backbone
        if layout.house:
            inside = iter(jax.random.split(next(keys), 4 + 2 * config.recursions))
            own = dataclasses.replace(config, hnet=HNetConfig())
            self.main = Backbone(own, keys=inside, dtype=self.dtype, remat=remat, unroll=unroll)
        else:
            self.main = stack(layout.stages, layout.main, next(keys))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
        boundaries: jax.Array | None = None,
        deterministic: bool = True,
        selection: Selecting = "topk",
        step: jax.Array | None = None,
        key: jax.Array | None = None,
        logits: bool = True,
    ) -> Output:
        """One forward pass.

        tokens         i32[batch, seq]   bytes
        positions      i32[batch, seq]   places in the documents; None: counted from where each begins
        segment_ids    i32[batch, seq]   documents, which nothing leaves; 0 is padding; None: one document per row
        valid          bool[batch, seq]  bytes that exist, the first of each row; another way to say padding
        boundaries     bool[batch, seq]  where chunks of the first stage begin, for the chunker `words`
        deterministic  False in training: noise and warm-ups apply
        selection      "topk": as it trains, with the capacities of the configuration; "threshold": as it generates,
                       without any. What is inside the H-Net selects likewise
        others         as in Transformer
        """
        if valid is not None:
            segment_ids = valid.astype(jnp.int32) if segment_ids is None else jnp.where(valid, segment_ids, 0)
        exists = None if segment_ids is None else segment_ids > 0
        if positions is None:
            positions = numbered(tokens.shape, segment_ids)
        level = Level(Places(positions, segment_ids, exists), tokens, boundaries)
        call = Call(
            selection, deterministic, step, key, limited=selection == "topk", keep=False, records=[], inner=[]
        )  # fmt: skip
        hidden, _ = self._through(0, self._embed(tokens), level, None, call)
        return self._output(hidden, level, call, logits)

    def head_weight(self) -> jax.Array:
        """The output matrix [vocab, width], in float32."""
        return (self.embedding if self.head is None else self.head)[...]

    def next_buffers(self, sums: dict[str, Any]) -> Any:
        """The model's buffers after a training step whose micro-batches' `Trace.sums` add up to `sums`."""
        model = nnx.clone(self)
        if isinstance(model.main, Backbone):
            model.main.update_buffers(sums)
        return nnx.state(model, Buffer)

    def experts(self) -> RoutedLayer | None:
        """A routed feed-forward of the network inside, all of whose kind are alike; None where all are dense."""
        return self.main.experts() if isinstance(self.main, Backbone) else None

    def selections(self) -> tuple[Selecting, ...]:
        """The ways of selecting that differ and that this model can evaluate."""
        if self.refuse_generation():
            return ("topk",)
        inside = self.main.selections() if isinstance(self.main, Backbone) else ("topk",)
        return ("topk", "threshold") if len(inside) > 1 or self.hnet.capacities else ("topk",)

    def refuse_generation(self) -> str:
        """Why generation cannot run; empty where it can."""
        return self.main.refuse_generation() if isinstance(self.main, Backbone) else ""

    # Generation

    def init_cache(self, batch: int, max_length: int) -> HNetCache:
        """An empty cache for `batch` sequences of at most `max_length` bytes."""
        zeros = jnp.zeros(batch, jnp.int32)

        def empty(stage: ChunkStage) -> StageState:
            width = stage.residual.bias.shape[0]
            return StageState(
                seen=zeros,
                encoder=stage.encoder.empty_state(batch, max_length),
                decoder=stage.decoder.empty_state(batch, max_length),
                last=jnp.zeros((batch, width), self.dtype),
                token=zeros,
                value=jnp.zeros((batch, width), jnp.float32),
                behind=jnp.zeros((batch, width), jnp.float32),
            )

        inside = self.main
        main = inside.init_cache if isinstance(inside, Backbone) else inside.empty_state
        return HNetCache(tuple(empty(stage) for stage in self.stages), main(batch, max_length), zeros)

    def prefill(
        self,
        tokens: jax.Array,
        cache: HNetCache,
        valid: jax.Array | None = None,
        *,
        boundaries: jax.Array | None = None,
        rows: int = 0,
    ) -> tuple[Output, HNetCache]:
        """Appends bytes i32[batch, n] to the cache.

        valid       bool[batch, n]: bytes that exist, the first of each row; None: all. The cache needs room for all n
        boundaries  bool[batch, n]: where chunks of the first stage begin, for the chunker `words`
        rows        of one byte each (n = 1): how many rows with a new chunk the network inside computes at once, until
                    none is left; 0: all rows, and what those without a chunk give is thrown away
        """
        if reason := self.refuse_generation():
            raise RecipeError(reason)
        seen = cache.stages[0].seen if cache.stages else cache.seen
        number = seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        level = Level(Places(number, None, valid, seen), tokens, boundaries)
        call = Call("threshold", True, None, None, limited=False, keep=True, rows=rows, records=[], inner=[])
        hidden, after = self._through(0, self._embed(tokens), level, cache, call)
        assert after is not None
        return self._output(hidden, level, call, True), after

    def decode_step(
        self, token: jax.Array, cache: HNetCache, *, boundaries: jax.Array | None = None, rows: int = 0
    ) -> tuple[Output, HNetCache]:
        """Appends one byte i32[batch] to each sequence; logits f32[batch, 1, vocab] of the next; see prefill."""
        return self.prefill(
            token[:, None], cache, boundaries=None if boundaries is None else boundaries[:, None], rows=rows
        )

    # Parts

    def _through(
        self, s: int, x: jax.Array, level: Level, cache: HNetCache | None, call: Call
    ) -> tuple[jax.Array, HNetCache | None]:
        """x [batch, n, width of the stage outside] through stage s and all inside it -> the same shape."""
        outside = x.shape[-1]
        if s == self.layout.stages:
            y, after = self._main(_widened(x, self.main_pad), level, cache, call)
            return y[..., :outside], after
        stage, state = self.stages[s], None if cache is None else cache.stages[s]
        h, encoder = stage.encoder(
            _widened(x, stage.pad), level.places, None if state is None else state.encoder, keep=call.keep
        )
        around = stage.residual(h)
        z, value, mask, after = self._chunked(s, h, level, cache, call)
        y, decoder = stage.decoder(
            (z + around).astype(self.dtype), level.places, None if state is None else state.decoder, keep=call.keep
        )
        if state is not None and after is not None:
            assert encoder is not None and decoder is not None
            own = self._advanced(state, level, h, value, mask)._replace(encoder=encoder, decoder=decoder)
            after = after._replace(stages=(*after.stages[:s], own, *after.stages[s + 1 :]))
        return y[..., :outside], after

    def _chunked(
        self, s: int, h: jax.Array, level: Level, cache: HNetCache | None, call: Call
    ) -> tuple[jax.Array, jax.Array, jax.Array, HNetCache | None]:
        """The encoder's output h [batch, n, width] -> what the decoder reads of the chunks, f32 of the same shape; that
        before the straight-through estimator; where chunks begin; and the cache after all inside."""
        stage, state = self.stages[s], None if cache is None else cache.stages[s]
        found = stage.chunker(self._heard(h, level, state, None if call.deterministic else call.key, s))
        places, shape = level.places, h.shape
        exists = jnp.ones(shape[:2], bool) if places.valid is None else places.valid
        found = found._replace(wanted=found.wanted & exists)
        segments = places.segments
        if self.hnet.packing == "device" and cache is None:
            found, exists, segments, h = packed(found, exists, segments, h)
        n = h.shape[1]
        selection, mask = select_boundaries(found, self.hnet.capacity(s, n) if call.limited else n)
        call.records.append(StageRecord(found, mask, exists, selection))
        if self.hnet.merge == "boundary":
            chunks = gather(h, selection.indices)
        else:
            chunks = merged(h, selection, segments, None if state is None else state.behind)
        chunks = constrain(chunks, "batch", "seq", None)
        seen = None if cache is None else (cache.stages[s + 1].seen if s + 1 < len(cache.stages) else cache.seen)
        inner = Level(inner_places(selection.valid, segments, selection.indices, seen))
        z, after = self._inside(s + 1, chunks, inner, cache, call)
        z = dechunk(
            z,
            selection,
            mask,
            smooth=stage.chunker.learned,
            segments=segments,
            initial=None if state is None else state.value,
            average=_average,
        )
        confidence = jnp.where(mask, found.prob, 1 - found.prob)
        y = z * straight_through(confidence)[..., None] if stage.chunker.learned else z
        return y.reshape(shape), z.reshape(shape), mask, after

    def _inside(
        self, s: int, x: jax.Array, level: Level, cache: HNetCache | None, call: Call
    ) -> tuple[jax.Array, HNetCache | None]:
        """As `_through`; of single bytes the rows without a chunk may be left out."""
        if cache is None or not call.rows or x.shape[1] > 1:
            return self._through(s, x, level, cache, call)

        def apply(x: jax.Array, places: Places, cache: HNetCache) -> Any:
            own = call._replace(records=[], inner=[])
            y, after = self._through(s, x, Level(places), cache, own)
            return y, after, (own.records, [out.trace.depth for out in own.inner])

        # Stages around stay as they are, so the loop does not carry them.
        around: Any = (None,) * s
        inner, axes = (c._replace(stages=around + c.stages[s:]) for c in (cache, self._batch_axes()))
        y, after, (records, depths) = in_groups(apply, x, level.places, inner, axes, call.rows)
        after = after._replace(stages=cache.stages[:s] + after.stages[s:])
        call.records.extend(records)
        call.inner.extend(Output(y, None, AuxLosses(), Trace(depth)) for depth in depths)
        return y, after

    def _batch_axes(self) -> HNetCache:
        """A cache's tree with the number of the axis of rows in the place of every array."""
        shapes = jax.eval_shape(lambda: self.init_cache(1, 1))
        of = lambda tree, axis: jax.tree.map(lambda _: axis, tree)  # noqa: E731
        stages = tuple(
            of(state, 0)._replace(encoder=of(state.encoder, 1), decoder=of(state.decoder, 1)) for state in shapes.stages
        )
        main = shapes.main.batch_axes() if isinstance(shapes.main, Cache) else of(shapes.main, 1)
        return HNetCache(stages, main, 0)  # type: ignore[arg-type]

    def _main(
        self, x: jax.Array, level: Level, cache: HNetCache | None, call: Call
    ) -> tuple[jax.Array, HNetCache | None]:
        places, before = level.places, None if cache is None else cache.main
        state: State | Cache | None
        if isinstance(self.main, Stack):
            assert not isinstance(before, Cache)
            y, state = self.main(x, places, before, keep=call.keep)
        elif cache is None:
            out = self.main.apply(
                x.astype(self.dtype),
                places.number,
                segment_ids=places.segments,
                valid=places.valid if self.layout.stages else None,
                deterministic=call.deterministic,
                selection=call.selection,
                step=call.step,
                key=call.key,
            )
            call.inner.append(out)
            return out.hidden, None
        else:
            assert isinstance(before, Cache)
            out, state = self.main.extend(x.astype(self.dtype), before, places.valid)
            call.inner.append(out)
            y = out.hidden
        if cache is None:
            return y, None
        count = places.number.shape[1] if places.valid is None else places.valid.sum(1, dtype=jnp.int32)
        assert state is not None
        return y, cache._replace(main=state, seen=cache.seen + count)

    def _heard(
        self, h: jax.Array, level: Level, state: StageState | None, key: jax.Array | None, s: int
    ) -> Heard:  # fmt: skip
        places, first = level.places, jnp.arange(h.shape[1]) == 0
        if state is not None:
            first = first & (state.seen[:, None] == 0)
        elif places.segments is None:
            first = jnp.broadcast_to(first, h.shape[:2])
        else:
            first = begins(places.segments)
        earlier = None
        if level.tokens is not None:
            earlier = shifted(level.tokens, None if state is None else state.token)
        return Heard(
            hidden=h,
            before=shifted(h, None if state is None else state.last),
            first=first,
            number=places.number,
            tokens=level.tokens,
            earlier=earlier,
            given=level.given,
            key=None if key is None else jax.random.fold_in(key, s),
        )

    def _advanced(
        self, state: StageState, level: Level, h: jax.Array, value: jax.Array, mask: jax.Array
    ) -> StageState:  # fmt: skip
        """The state but for the stacks after positions with encoder outputs h and averages value [batch, n, width], of
        which mask bool[batch, n] says where chunks begin."""
        n, valid = h.shape[1], level.places.valid
        count = jnp.full(len(h), n, jnp.int32) if valid is None else valid.sum(1, dtype=jnp.int32)

        def latest(new: jax.Array, old: jax.Array) -> jax.Array:
            """At each row's last position that exists; the old where none does."""
            last = jax.vmap(lambda row, i: row[jnp.maximum(i - 1, 0)])(new, count)
            return jnp.where((count > 0).reshape(-1, *(1,) * (old.ndim - 1)), last, old)

        return state._replace(
            seen=state.seen + count,
            last=latest(h, state.last),
            token=state.token if level.tokens is None else latest(level.tokens, state.token),
            value=latest(value, state.value),
            behind=state.behind if self.hnet.merge == "boundary" else behind(h, mask, valid, state.behind),
        )

    def _output(self, hidden: jax.Array, level: Level, call: Call, logits: bool) -> Output:
        inner = call.inner[0] if call.inner else None
        aux, trace = assemble(self.hnet, call.records, inner, hidden.shape[:2], level.places.valid, batch_shards())
        return Output(hidden, self._logits(hidden) if logits else None, aux, trace)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = gathered(self.embedding[...], ("vocab", "width"), self.dtype)
        return constrain(table[tokens], "batch", "seq", None)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        weight = use(self.embedding if self.head is None else self.head, hidden.dtype)
        return jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)


def _average(z: jax.Array, p: jax.Array, *, starts: jax.Array | None, initial: jax.Array | None) -> jax.Array:
    """`ema`, each device computing its own rows."""
    rows = ("batch",)
    apply = lambda z, p, starts, initial: ema(z, p, starts=starts, initial=initial)  # noqa: E731
    names = [rows, rows, None if starts is None else rows, None if initial is None else rows]
    return sharded(apply, names, rows)(z, p, starts, initial)


def _pad(config: HNetConfig, stage: int) -> nnx.Param | None:
    """The vector that widens what enters a stage; zero at first (H-Net paper, section 2.3)."""
    more = config.shape(stage).width - config.shape(stage - 1).width if stage else 0
    return nnx.Param(jnp.zeros(more), axes=(None,)) if more else None


def _widened(x: jax.Array, pad: nnx.Param | None) -> jax.Array:
    if pad is None:
        return x
    own = jnp.broadcast_to(pad[...].astype(x.dtype), (*x.shape[:2], pad.shape[0]))
    return jnp.concatenate([x, own], axis=-1)
