"""A language model: embedding, a body, output head."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.feed_forwards import FeedForwardModule
from adaptive.layers.linear import use
from adaptive.layers.reach import Reach, causal_blocks
from adaptive.layers.remat import Remat
from adaptive.layers.site import Buffer, Site, normal_param
from adaptive.layers.stack import Making
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.models import low_rank as lora
from adaptive.models.bodies import Body, BodyModule, plain
from adaptive.models.facts import Facts, facts_of
from adaptive.models.replay import recorded, unless_strayed
from adaptive.parallel.rules import constrain, gathered
from adaptive.routing.replay import Replay
from adaptive.routing.types import Aux, AuxLosses, Output, Told, Trace
from adaptive.settings import check_ranges, ranged, since

Sees = Literal["past", "all"] | int
Selecting = Literal["topk", "threshold"]  # the rules "train" and "causal", as evaluation and reports call them


@dataclasses.dataclass(frozen=True)
class Settings:
    """A language model of `vocab_size` tokens with a residual stream of `width`."""

    vocab_size: int = ranged(320, least=1)
    width: int = ranged(128, least=1)
    body: Body = plain.Settings()
    tie_embeddings: bool = True
    padding_token: int = ranged(-1, least=-1)  # its embedding the lookup does not train (PyTorch); -1: none
    norm_eps: float = ranged(1e-5, above=0)
    init_std: float = ranged(0.02, least=0)  # of initial weights
    embedding_std: float = ranged(0.02, least=0)
    embedding_scale: float = since(1.0, before=1.0, above=0)  # of the embeddings as they are looked up (Gemma)
    logit_soft_cap: float = since(0.0, before=0.0, least=0)  # cap * tanh(logits / cap) (Gemma 2); 0: as they are
    positions: int = since(0, before=0, least=0)  # places with learned embeddings beside the tokens' (GPT-2); 0: none
    low_rank: lora.Settings | None = since(None, before=None)  # additions to the body's matrices (LoRA)

    def validate(self, at: str = "model") -> None:
        """Raises RecipeError for the first setting that cannot work, with what would."""
        check_ranges(self, f"{at}.")
        if self.padding_token >= self.vocab_size:
            raise RecipeError(
                f"{at}.padding_token={self.padding_token}: must be a token, 0 to {self.vocab_size - 1}, or -1 for none"
            )
        self.body.check(self.width, f"{at}.body")
        if self.low_rank is not None:
            self.low_rank.check(self.body, f"{at}.low_rank")

    @property
    def site(self) -> Site:
        """Where the body stands."""
        return Site(self.width, self.init_std, norm_eps=self.norm_eps)

    def summed(self) -> "Settings":
        """Those of the model whose matrices are the sums with their additions of low rank."""
        if self.low_rank is None:
            return self
        return dataclasses.replace(self, low_rank=None, body=self.low_rank.summed(self.body))

    def facts(self) -> Facts:
        """What evaluation, alarms and reports need to know."""
        return facts_of(self, "model")

    def changes(self) -> tuple[int, ...]:
        """Training steps from which on other settings hold."""
        return self.body.changes()

    def warmup_steps(self) -> int:
        """Training steps during which a router warms up."""
        return self.body.warmup_steps()

    def at_step(self, step: int) -> "Settings":
        """The settings that hold at a training step; -1: at the last."""
        changes = self.body.changes()
        if not changes:
            return self
        return dataclasses.replace(self, body=self.body.at_step(step if step >= 0 else changes[-1]))

    def build(
        self,
        key: jax.Array,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: Remat = "none",
        unroll: bool = False,
    ) -> "LanguageModel":
        """The model, parameters drawn from `key`; validated first. Parameters are float32, `dtype` is what layers
        compute in, `unroll` unrolls the scans over layers."""
        self.validate()
        return LanguageModel(self.at_step(-1), key, Making(jnp.dtype(dtype), remat, unroll))


class LanguageModel(nnx.Module):
    """Call it with tokens; `init_cache`, `prefill` and `decode_step` generate."""

    def __init__(self, settings: Settings, key: jax.Array, making: Making):
        s = self.settings = settings
        self.dtype = making.dtype
        keys = iter(jax.random.split(key, 64))
        shape, axes = (s.vocab_size, s.width), ("vocab", "width")
        self.embedding = normal_param(next(keys), shape, axes, s.embedding_std)
        self.head = None if s.tie_embeddings else normal_param(next(keys), shape, axes, s.init_std)
        for table in (self.embedding, self.head):
            if table is not None:
                table.set_metadata(rate=s.body.outer_rate())
        places = (s.positions, s.width)
        self.positions = normal_param(next(keys), places, (None, "width"), s.embedding_std) if s.positions else None
        self.body: BodyModule = s.body.build(s.site, keys, making)
        self.making = making
        added = s.low_rank
        self.low_rank = None if added is None else lora.additions(added, s.body, s.site, making, next(keys))

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
        sees: Sees = "past",
        reach: Reach | None = None,
        step: jax.Array | None = None,
        key: jax.Array | None = None,
        passes: int | jax.Array | None = None,
        experts_per_token: jax.Array | None = None,
        mask_ratio: jax.Array | None = None,
        replay: Replay | Trace | None = None,
        logits: bool = True,
    ) -> Output:
        """One forward pass.

        tokens         i32[batch, seq]
        positions      i32[batch, seq]   places for rotary embeddings; None: from the row's beginning, in an H-Net from
                       where each document begins
        segment_ids    i32[batch, seq]   documents, which nothing leaves; 0 is padding; None: one document per row
        valid          bool[batch, seq]  tokens that exist, the first of each row; another way to say padding
        boundaries     bool[batch, seq]  where chunks of the first stage begin, for the chunker `words`
        deterministic  False in training: noise and warm-ups, which need `step`, apply
        selection      how routers decide: "topk" as they train, over the whole sequence and within capacities;
                       "threshold" token by token from the past, as in generation
        sees           what attention sees: "past"; "all"; a number: earlier blocks of so many tokens of the document,
                       and the own block whole
        reach          what each position sees, instead of `sees`; None: as that says
        step           i32[] training step, while a warm-up lasts; None: no warm-up
        key            PRNG key of noise in training and of random routing
        passes         passes of a recursion at most: of routed depth, tokens that would go on stop there. None: as the
                       settings say. With depth=all it may be i32[], traced, and more than in the settings where all
                       parameters are shared; else refused, or NaN where it is traced
        experts_per_token  i32[batch], the average in each sequence, for the router expert_choice: its experts take so
                       many tokens of a sequence or chunk, up to its `most_per_token`; None: as the settings say
        mask_ratio     f32[batch], the share of each row's tokens that are hidden, which the `schedule` of the router
                       expert_choice follows; None: it takes `experts_per_token`
        replay         what an earlier pass over the same tokens decided about depth, experts and chunks, or what was
                       recorded in generation (`recorded`): it is decided again. With the `selection` of that pass
        logits         False leaves them out, for a loss that computes them in chunks from `hidden` and `head_weight`
        """
        where, call = self.asked(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            valid=valid,
            boundaries=boundaries,
            deterministic=deterministic,
            selection=selection,
            sees=sees,
            reach=reach,
            step=step,
            key=key,
            passes=passes,
            experts_per_token=experts_per_token,
            mask_ratio=mask_ratio,
        )
        if replay is not None:
            own = self.recorded(replay, tokens.shape) if isinstance(replay, Trace) else replay
            call = call.replace(replay=own)
        through = self._computed_with()(self.embedded(tokens, where), where, call)
        out = self._output(through.hidden, through.aux, through.trace, logits)
        return out if call.replay is None else unless_strayed(out)

    def recorded(self, trace: Trace, shape: tuple[int, ...]) -> Replay:
        """What a trace of tokens of this shape [batch, seq] says was decided. Raises RecipeError where it does not say
        it: in training, and of generation without `record`."""
        return recorded(trace, self.settings.facts(), (shape[0], shape[1]))

    def asked(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
        boundaries: jax.Array | None = None,
        deterministic: bool = True,
        selection: Selecting = "topk",
        sees: Sees = "past",
        reach: Reach | None = None,
        step: jax.Array | None = None,
        key: jax.Array | None = None,
        passes: int | jax.Array | None = None,
        experts_per_token: jax.Array | None = None,
        mask_ratio: jax.Array | None = None,
    ) -> tuple[Where, Call]:
        """The positions of a forward pass, and what it is about; arguments as of a call."""
        if valid is not None:
            segment_ids = valid.astype(jnp.int32) if segment_ids is None else jnp.where(valid, segment_ids, 0)
        given = {"tokens": tokens} | ({} if boundaries is None else {"boundaries": boundaries})
        call = Call(
            rule="train" if selection == "topk" else "causal",
            sees="past" if sees == "past" else "all",
            limited=selection == "topk",
            training=not deterministic,
            step=None if deterministic else step,
            key=key,
            given=given,
            passes=passes,
            experts_per_token=experts_per_token,
            mask_ratio=mask_ratio,
        )
        shape = (tokens.shape[0], tokens.shape[1])
        if positions is None and not self.settings.body.counts_documents():
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        where = Where.whole(shape, positions, segment_ids)
        if reach is None and isinstance(sees, int):
            reach = causal_blocks(where.number, sees)
        return where.replace(reach=reach), call

    def head_weight(self) -> jax.Array:
        """The output matrix [vocab, width], in float32."""
        return (self.embedding if self.head is None else self.head)[...]

    # Parts that route

    def routed(self) -> dict[str, FeedForwardModule]:
        """Routed feed-forwards by their path below the body, in the order they run."""
        found = {}
        for path, node in nnx.iter_modules(self.body):
            if isinstance(node, FeedForwardModule) and node.describe():
                found["/".join(map(str, path))] = node
        return {path: found[path] for path in sorted(found, key=_running_order)}

    def next_buffers(self, sums: dict[str, Any]) -> Any:
        """The buffers after a training step whose micro-batches' `Trace.sums` add up to `sums`."""
        model = nnx.clone(self)  # modules are updated in place, and the caller may keep the old buffers
        model.body.update(sums.get("depth"))
        for path, layer in model.routed().items():
            layer.update(sums[path])
        return nnx.state(model, Buffer)

    def selections(self) -> tuple[Selecting, ...]:
        """The ways of selecting that differ and that this model can evaluate: as it trains, and as it generates."""
        layers = self.routed().values()
        if any(layer.refuse_generation() for layer in layers):
            return ("topk",)
        differ = self.body.rules_differ() or any(not layer.selects_alike() for layer in layers)
        return ("topk", "threshold") if differ else ("topk",)

    def refuse_generation(self) -> str:
        """Why the model cannot decide from the past alone, as generation must; empty where it can."""
        return next((why for layer in self.routed().values() if (why := layer.refuse_generation())), "")

    def refuse_cache(self) -> str:
        """Why generation has no cache; empty where it has one."""
        return self.body.refuse_cache()

    def no_gradient(self) -> str:
        """Why a router learns nothing, with what would help; empty where all learn."""
        return next((why for layer in self.routed().values() if (why := layer.no_gradient())), "")

    # Generation

    def init_cache(self, batch: int, max_length: int) -> State:
        """An empty cache for `batch` sequences of at most `max_length` tokens; leaves [layers, batch, ...]."""
        return {"seen": jnp.zeros((1, batch), jnp.int32), "body": self.body.empty(batch, max_length)}

    def prefill(
        self,
        tokens: jax.Array,
        cache: State,
        valid: jax.Array | None = None,
        *,
        boundaries: jax.Array | None = None,
        rows: int = 0,
        at: jax.Array | None = None,
        passes: int | None = None,
        record: bool = False,
    ) -> tuple[Output, State]:
        """Appends tokens i32[batch, n] to the cache; routers decide causally.

        valid       bool[batch, n]: tokens that exist, the first of each row; None: all. The cache needs room for all n
        boundaries  bool[batch, n]: where chunks of the first stage begin, for the chunker `words`
        rows        of one token each (n = 1): how many rows with a new chunk the network inside an H-Net computes at
                    once, and how many that take a pass of a recursion, until none is left; 0: all rows where any does,
                    and what the others give is thrown away
        at          i32[batch]: of each row the one position behind which logits are wanted; None: behind all. Hidden
                    states and logits are then [batch, 1, ...]
        passes      passes of a recursion at most, as of a call
        record      whether the trace says all that routers decided (`recorded`); not with `rows` in an H-Net
        """
        if reason := self.refuse_generation() or self.refuse_cache():
            raise RecipeError(reason)
        given = {"tokens": tokens} | ({} if boundaries is None else {"boundaries": boundaries})
        where = Where.after(cache["seen"][0], tokens.shape[1], valid)
        call = Call(rule="causal", limited=False, counts=False, given=given, rows=rows, passes=passes, record=record)
        through = self._computed_with()(self.embedded(tokens, where), where, call, cache["body"])
        after = {"seen": cache["seen"] + where.counts(), "body": through.state}
        hidden = through.hidden if at is None else jnp.take_along_axis(through.hidden, at[:, None, None], axis=1)
        return self._output(hidden, through.aux, through.trace, True), after

    def decode_step(
        self, token: jax.Array, cache: State, *, boundaries: jax.Array | None = None, rows: int = 0
    ) -> tuple[Output, State]:
        """Appends one token i32[batch] to each sequence; logits f32[batch, 1, vocab] of the next; see prefill."""
        given = None if boundaries is None else boundaries[:, None]
        return self.prefill(token[:, None], cache, boundaries=given, rows=rows)

    def revise(
        self,
        tokens: jax.Array,
        places: jax.Array,
        cache: State,
        exists: jax.Array,
        *,
        sees: Sees = "all",
        mask_ratio: jax.Array | None = None,
    ) -> tuple[Output, State]:
        """Computes some positions of rows whose others the cache holds, and puts them into it; routers decide as they
        train, among these positions.

        tokens      i32[batch, n]
        places      i32[batch, n]: where they stand, ascending, all different
        exists      bool[batch, n]: those that exist, wherever they stand
        sees        as of a call: "all" that the cache holds, or blocks of so many positions
        mask_ratio  as of a call, of whole rows
        """
        where = Where(places, places, None, exists, scattered=True)
        if isinstance(sees, int):
            first = places // sees * sees
            where = where.replace(reach=Reach(jnp.zeros_like(first), first, first, first + sees))
        given = {"tokens": tokens}
        call = Call(sees="past" if sees == "past" else "all", counts=False, given=given, mask_ratio=mask_ratio)
        through = self._computed_with()(self.embedded(tokens, where), where, call, cache["body"])
        return self._output(through.hidden, through.aux, through.trace, True), cache | {"body": through.state}

    # Parts

    def summed(self) -> "LanguageModel":
        """The model whose matrices are the sums with their additions of low rank; itself without any."""
        if self.low_rank is None:
            return self
        model = nnx.clone(self)
        model.settings, model.body, model.low_rank = self.settings.summed(), self._computed_with(), None
        return model

    def _computed_with(self) -> BodyModule:
        """The body, additions of low rank included."""
        s = self.settings
        if s.low_rank is None:
            return self.body
        return lora.summed(s.low_rank, s.body, s.site, self.making, self.body, self.low_rank)

    def embedded(self, tokens: jax.Array, where: Where) -> jax.Array:
        """[rows, n, width]; NaN at places that have no embedding."""
        table = gathered(self.embedding[...], ("vocab", "width"), self.dtype)
        x = table[tokens]
        if (padding := self.settings.padding_token) >= 0:
            x = jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)
        if (scale := self.settings.embedding_scale) != 1:
            x = x * jnp.asarray(scale, x.dtype)
        if self.positions is not None:
            x = x + self._places(where)
        return constrain(x, "batch", "seq", None)

    def _places(self, where: Where) -> jax.Array:
        """Embeddings [rows, n, width] of places in the text."""
        assert self.positions is not None
        longest, n = self.settings.positions, where.shape[1]
        if longest < n and where.segments is None and where.exists is None:
            raise RecipeError(f"model.positions={longest}: texts of {n} tokens are longer than that")
        return use(self.positions, self.dtype).at[where.number].get(mode="fill", fill_value=jnp.nan)

    def _output(self, hidden: jax.Array, aux: AuxLosses, trace: Any, logits: bool) -> Output:
        losses = AuxLosses({**aux, **self.expert_losses(trace.told)})
        return Output(hidden, self._logits(hidden) if logits else None, losses, trace)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        weight = use(self.embedding if self.head is None else self.head, hidden.dtype)
        logits = jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)
        cap = self.settings.logit_soft_cap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def expert_losses(self, told: dict[str, Told]) -> AuxLosses:
        """Losses of routed feed-forwards, those of one kind over all their calls together; of a second kind under names
        with its path."""
        kinds: dict[Any, tuple[str, FeedForwardModule, list[Told]]] = {}
        for path, layer in self.routed().items():
            if path in told:
                kinds.setdefault(layer.settings, (path, layer, []))[2].append(told[path])  # type: ignore[attr-defined]
        losses = AuxLosses()
        for number, (path, layer, calls) in enumerate(kinds.values()):
            for name, (loss, coefficient) in layer.losses(calls).items():
                losses[f"{path}/{name}" if number else name] = Aux(loss, coefficient)
        return losses


def _running_order(path: str) -> tuple[int, ...]:
    """Encoders run before what is inside, preludes before cores, and so on."""
    order = {"encoder": 0, "prelude": 0, "inner": 1, "core": 1, "decoder": 2, "coda": 2}
    return tuple(order.get(part, int(part) if part.isdecimal() else 0) for part in path.split("/"))
