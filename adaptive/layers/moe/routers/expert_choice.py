"""Expert choice: every expert takes its top tokens (Zhou et al. 2022, arXiv 2202.09368), and how it stays causal.

An expert that chooses over a sequence compares a token with later ones: legal in a bidirectional model, a leak in a
causal one, and undefined while generating. `group` says among which tokens an expert chooses in training, `select`
whether it compares tokens at all, and `decode` what "threshold" selection (generation) does instead:

group=sequence   all tokens of a sequence; sees the future in training
group=batch      all tokens of the batch (EC-DLM's batch level); sees the future in training
group=chunk      the tokens of a chunk of `chunk` positions: the future that is seen ends with the chunk
group=position   the tokens at one position of all sequences: sees no future, but the other sequences
select=threshold a token is taken if its score is above the running threshold of earlier batches, first come first
                 served up to `slack` times a sequence's capacity: sees neither the future nor the other sequences
decode=threshold that threshold decides: per expert the running mean of the smallest score that was taken
decode=predictor a small router, trained to predict the choice, decides (as in Mixture-of-Depths)
decode=refuse    the model cannot generate: for bidirectional models, and for those who want the leak
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive.errors import RecipeError
from adaptive.layers.linear import scored
from adaptive.layers.moe.base import Context, ExpertRouter, Routing, statistics, z_loss
from adaptive.layers.moe.choosing import check_shared, grouped, jittered, shared_in_experts
from adaptive.layers.moe.scheduled import Scheduled, Shared, fitted
from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.site import Site, normal_param
from adaptive.parallel.shard import sharded
from adaptive.routing import scale
from adaptive.routing.capacity import scaled
from adaptive.routing.dispatch import by_expert, by_mask
from adaptive.routing.losses import averaged
from adaptive.routing.masked import softmax_over
from adaptive.routing.types import Summed
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Scheduled):
    """Zhou et al.: the defaults with decode=refuse. Flaxformer: rounding=nearest, minimum=4 as well. EC-DLM:
    score=selected, decode=refuse, and two shared experts; its pre-softmax is score=softmax with a route_scale."""

    score: Literal["softmax", "selected", "sigmoid"] = "softmax"  # what weights are; selection ranks softmax or logits
    route_scale: float = 1.0  # multiplies the weights
    group: Literal["sequence", "batch", "chunk", "position"] = "sequence"
    chunk: int = ranged(64, least=1)
    select: Literal["top", "threshold"] = "top"
    decode: Literal["threshold", "predictor", "refuse"] = "threshold"
    slack: float = ranged(1.25, above=0)  # of select=threshold
    momentum: float = ranged(0.99, least=0, below=1)  # of the running threshold
    predictor_coefficient: float = ranged(0.01, least=0)
    rounding: Literal["down", "nearest"] = "down"  # of group * k / experts; nearest: halves to even
    minimum: int = ranged(1, least=1)  # tokens that every expert takes at least
    most_per_token: float = ranged(0.0, least=0)  # the largest average that a call asks for; 0: experts_per_token
    load_coefficient: float = ranged(0.0, least=0)  # EC-DLM's loss that pushes popular tokens down
    jitter: float = ranged(0.0, least=0, most=1)  # training multiplies the router's input by U(1 - jitter, 1 + jitter)
    scale_to_shared: bool = False  # multiplies a token's weights by a factor of the number of its experts (EC-DLM)

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if self.most_per_token and not self.experts_per_token <= self.most_per_token <= config.experts:
            raise RecipeError(
                f"{at}.router.most_per_token={self.most_per_token:g}: must be from {at}.router.experts_per_token="
                f"{self.experts_per_token:g} to {at}.experts={config.experts}, or 0 for experts_per_token"
            )
        if self.select == "threshold" and self.group != "sequence":
            raise RecipeError(
                f"{at}.router.select=threshold compares no tokens, so {at}.router.group={self.group} has no meaning: "
                "set group=sequence"
            )
        if self.schedule != "static" and (self.group != "sequence" or self.select != "top"):
            raise RecipeError(
                f"{at}.router.schedule={self.schedule} gives every sequence a capacity of its own: set "
                f"{at}.router.group=sequence and select=top"
            )
        if self.scale_to_shared:
            check_shared(config, at)

    def against_starving(self, at: str) -> str:
        instead = "" if self.decode == "predictor" else f", or use {at}.router.decode=predictor"
        return (
            "the threshold that replaces top-k lags behind the router or does not fit it: train on, lower "
            f"{at}.router.momentum{instead}"
        )

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.slack" if self.select == "threshold" else super().against_dropping(at)

    def coefficients(self) -> dict[str, float]:
        own = {"popularity_loss": self.load_coefficient, "predictor_loss": self.predictor_coefficient}
        return super().coefficients() | own

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.group != "chunk":
            found["chunk"] = f"group={self.group}"
        if self.select != "threshold":
            found["slack"] = f"select={self.select} never takes more than its capacity"
        if self.decode != "predictor":
            found["predictor_coefficient"] = f"decode={self.decode} has no predictor"
        if self.decode != "threshold" and self.select != "threshold":
            found["momentum"] = f"select={self.select} and decode={self.decode} read no threshold"
        return found

    def takes(self, config: MoESettings, tokens: Any, k: float | None = None) -> Any:
        """Tokens that an expert takes from a group of `tokens`, an int or i32[...] of them, for `k` experts per token;
        None: as many as the settings say."""
        k = self.experts_per_token if k is None else k
        found = scaled(tokens, k / config.experts, self.rounding)
        if isinstance(found, int):
            return min(tokens, max(found, self.minimum))
        return jnp.maximum(found, self.minimum)

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        if self.select == "top" and self.group in ("batch", "position"):
            return super().pairs(config, tokens, site)
        length = min(self.chunk, int(tokens)) if self.group == "chunk" else int(tokens)
        taken = self.takes(config, length)
        if self.select == "threshold":
            return config.experts * min(length, math.ceil(taken * self.slack))
        return config.experts * math.ceil(tokens / length) * taken

    def matrices(self, config: MoESettings, width: int) -> int:
        return super().matrices(config, width) * (2 if self.decode == "predictor" else 1)

    def train_flops(self, config: MoESettings, tokens: float, width: int) -> float:
        # The predictor's input is cut off from the gradient, which spares one of its three matmuls.
        return 2.0 * tokens * width * config.choices * (5 if self.decode == "predictor" else 3)


class Router(ExpertRouter):
    """scores -> every expert's top tokens.

    weight      f32[width, experts]
    predictor   f32[width, experts], of decode=predictor; reads the input behind a stop_gradient
    threshold   f32[experts], updates f32[]: buffers of the running threshold

    score       ranked by        weight of a token's expert e
    softmax     softmax over e   the same, not renormalised (the original)
    selected    logits           softmax over the experts that took the token (EC-DLM)
    sigmoid     logits           sigmoid, divided by its sum over the experts that took the token (EC-DLM)

    A token that no expert takes has weight 0 everywhere. Ties go to the earlier token. An expert takes
    `rounding`(n k / experts) of the n real tokens of a group, where k is experts_per_token or, in sequences and chunks,
    what the context's `limit` says of the sequence, up to most_per_token; in sequences also what the `schedule` makes
    of the context's mask_ratio. Its losses are popularity_loss (load_coefficient) and predictor_loss.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        matrix, predictor = jax.random.split(key)
        super().__init__(config, site, matrix)
        o: Settings = self.options
        shape, predicts = (site.width, config.experts), o.decode == "predictor"
        self.predictor = normal_param(predictor, shape, (None, None), site.std, site.stack) if predicts else None
        # A fresh softmax router scores about 1 / experts, a fresh logit is about 0.
        start = 1 / config.experts if o.score == "softmax" else 0.0
        self.threshold = site.buffer(jnp.full(config.experts, start))
        self.updates = site.buffer(jnp.zeros(()))
        self.table = scale.expert_choice_table(config.experts, shared_in_experts(config)) if o.scale_to_shared else ()

    def capacity(self, tokens: int, k: float | None = None) -> int:
        """Tokens that an expert takes from a group of `tokens` for `k` experts per token; None: as the settings say.

        Raises RecipeError where the sequences of a batch are too few for one of them.
        """
        experts, k = self.config.experts, self.options.experts_per_token if k is None else k
        if self.options.group == "position" and tokens * k < experts:
            raise RecipeError(
                f"router.group=position chooses among the {tokens} sequences of a batch, too few for {experts} experts "
                f"and {k:g} of them per token: train.batch_size must be at least {math.ceil(experts / k)}"
            )
        return self.options.takes(self.config, tokens, k)

    def __call__(self, x: jax.Array, context: Context) -> Routing:
        c, o = self.config, self.options
        logits = self.logits(jittered(x, o.jitter, context))
        probabilities = jax.nn.softmax(logits, axis=-1)
        ranked = jax.lax.stop_gradient(probabilities if o.score == "softmax" else logits)
        if context.present is not None:
            ranked = jnp.where(context.present[..., None], ranked, -jnp.inf)
        ranked = context.among(ranked, -jnp.inf)
        least = self.threshold[...]
        refused = None  # pairs that were wanted and found no room
        bounds: dict[str, int] | None = {}
        if context.selection == "threshold":
            mask = self._alone(x, ranked)
        elif o.select == "threshold":
            mask, bounds, least, refused = self._first_above(ranked, context)
        elif o.group in ("batch", "position"):
            mask, bounds, least = self._across(ranked, context)
        else:
            within = self._within(ranked, context)
            index, valid, least = within.position, within.valid, within.least
            mask = _mask_of(index, valid, x.shape[1])
            refused = None if within.wanted is None else _mask_of(index, within.wanted & ~valid, x.shape[1])
            bounds = None
        if context.replayed is not None and bounds is not None:
            mask = context.replayed
        weights = self._weights(logits, probabilities, mask)
        if bounds is None:
            take = jax.vmap(lambda w, i: jax.vmap(lambda w, i: w[i])(w.T, i))
            dispatch = by_expert(index, take(weights, index), valid, x.shape[1], within.shared)
        else:
            dispatch = by_mask(mask, weights, **bounds)
        pairs = c.experts * o.experts_per_token
        losses: dict[str, Summed] = {
            "router_z_loss": z_loss(logits, context.present),
            "popularity_loss": _popularity(logits, mask, context.present, o.group == "batch", pairs),
        }
        if self.predictor is not None and context.selection == "topk":
            bce = optax.sigmoid_binary_cross_entropy(self._predicted(x), mask.astype(jnp.float32)).mean(-1)
            losses["predictor_loss"] = averaged(bce, context.present)
        claimed = mask if refused is None else mask | refused
        stats = statistics(dispatch, logits, claimed.sum((0, 1)).astype(jnp.float32), context.present)
        stats["least"] = jax.lax.stop_gradient(least)
        stats |= self._of_schedule(claimed, context)
        return Routing(dispatch, losses, stats, {}, logits)

    def update(self, stats: dict[str, jax.Array]) -> None:
        # The first updates are plain means, so that the threshold forgets its start at once. "least" is a sum over
        # micro-batches, "calls" their number.
        calls = stats["calls"]
        rate = jnp.maximum(1 - self.options.momentum, 1 / (self.updates[...] + 1))
        fresh = stats["least"] / calls[..., None]
        self.threshold[...] = self.threshold[...] + rate[..., None] * (fresh - self.threshold[...])
        self.updates[...] = self.updates[...] + 1

    def selects_alike(self) -> bool:
        return False

    def no_gradient(self) -> str:
        if self.config.experts > 1:
            return ""
        return "the weight of a token in experts=1 is always 1 and the router learns nothing"

    def refuse_generation(self) -> str:
        if self.options.decode != "refuse":
            return ""
        return (
            "expert choice with decode=refuse compares every token with later ones, which do not exist while "
            "generating; train with router.decode=threshold or decode=predictor"
        )

    # Who is taken; each gives a mask bool[batch, seq, experts] and, where it trains, the least score that was taken

    def _within(self, ranked: jax.Array, context: Context) -> "_Within":
        """Top tokens of every sequence or chunk."""
        batch, seq, experts = ranked.shape
        length = min(self.options.chunk, seq) if self.options.group == "chunk" else seq
        chunks = -(-seq // length)
        padded = jnp.pad(ranked, ((0, 0), (0, chunks * length - seq), (0, 0)), constant_values=-jnp.inf)
        scores = padded.reshape(batch, chunks, length, experts).transpose(0, 3, 1, 2)
        capacity = self._most(length, context)
        real = jnp.isfinite(scores[:, :1]).sum(-1, dtype=jnp.int32)  # [batch, 1, chunks] tokens that exist
        wanted = limit = self._limit(real, context)
        if context.replayed is not None:  # nothing else has a score
            wanted = limit = jnp.full_like(wanted, capacity)
        shared = self._shared(batch, seq, context)
        if shared is not None:
            limit = fitted(wanted.reshape(-1, shared.sequences), shared.rows, capacity).reshape(wanted.shape)
        best, index = top_of_sequences(scores, capacity)
        valid = (jnp.arange(capacity) < limit[..., None]) & jnp.isfinite(best)
        last = jnp.where(valid, best, jnp.inf).min(-1)  # [batch, experts, chunks]
        least = _mean_of_finite(last.transpose(0, 2, 1))
        # A slot that holds nothing must not point past the end of the sequence.
        position = jnp.minimum(index + (jnp.arange(chunks, dtype=jnp.int32) * length)[:, None], seq - 1)
        flat = lambda a: a.reshape(batch, experts, chunks * capacity)  # noqa: E731
        if shared is None:
            return _Within(flat(position), flat(valid), least)
        asked = (jnp.arange(capacity) < wanted[..., None]) & jnp.isfinite(best)
        return _Within(flat(position), flat(valid), least, flat(asked), shared)

    def _limit(self, real: jax.Array, context: Context) -> jax.Array:
        """Tokens i32, the shape of `real`, that an expert takes from groups of `real` i32[batch, ...] tokens."""
        limit = context.limit
        if limit is None and self._scheduled(context):
            limit = self.options.by_ratio(context.mask_ratio)
        if limit is None:
            return self.options.takes(self.config, real)
        return self.options.takes(self.config, real * limit.reshape(-1, *(1,) * (real.ndim - 1)), 1.0)

    def _most(self, length: int, context: Context) -> int:
        """Tokens that an expert may take from a group of `length`, whatever a call asks for."""
        o, limit = self.options, context.limit
        if limit is None:
            return self.capacity(length, o.k_max if self._scheduled(context) else None)
        most = max(o.experts_per_token, o.most_per_token)
        if not isinstance(limit, jax.core.Tracer) and np.max(limit, initial=0) > most:
            raise RecipeError(
                f"a limit of {np.max(limit)} experts per token, and room for {most:g}: set router.most_per_token"
            )
        return self.capacity(length, most)

    def _scheduled(self, context: Context) -> bool:
        return self.options.schedule != "static" and context.mask_ratio is not None

    def _shared(self, batch: int, seq: int, context: Context) -> Shared | None:
        """What sequences share in training; elsewhere each has what its schedule says, whoever else is there."""
        if not self._scheduled(context) or context.limit is not None or not context.training:
            return None
        return self.options.shared(self.config, batch, seq)

    def _of_schedule(self, claimed: jax.Array, context: Context) -> dict[str, jax.Array]:
        """Sums of calls: capacity, the mean of experts per token that sequences ask for; rows_over_average, what those
        that share rows ask for over their average; rows_deviation, how far that is from 1. All f32[]."""
        if not self._scheduled(context) or context.limit is not None:
            return {}
        batch, seq, _ = claimed.shape
        o, shared = self.options, self.options.shared(self.config, batch, seq)
        rows = claimed[..., 0].sum(-1, dtype=jnp.float32).reshape(-1, batch if shared is None else shared.sequences)
        share = rows.mean(-1) * self.config.experts / (seq * o.experts_per_token)
        capacity = o.by_ratio(context.mask_ratio).mean(dtype=jnp.float32)
        return {"capacity": capacity, "rows_over_average": share.mean(), "rows_deviation": jnp.abs(share - 1).mean()}

    def _across(self, ranked: jax.Array, context: Context) -> tuple[jax.Array, dict[str, int], jax.Array]:
        """Top tokens of the whole batch, or of each position over the batch."""
        if context.limit is not None:
            raise RecipeError(
                f"router.group={self.options.group} chooses over several sequences, which cannot have a number of "
                "experts per token each: set group=sequence"
            )
        batch, seq, experts = ranked.shape
        position = self.options.group == "position"
        rows = ranked.transpose(1, 2, 0) if position else ranked.reshape(1, -1, experts).swapaxes(1, 2)
        capacity = self.capacity(rows.shape[-1])
        best, index = top_tokens(rows, capacity)
        limit = self.options.takes(self.config, jnp.isfinite(rows[:, :1]).sum(-1, dtype=jnp.int32))  # [groups, 1]
        valid = jnp.isfinite(best) & (jnp.arange(capacity) < limit[..., None])
        put = lambda i, v: jnp.zeros(rows.shape[-1], bool).at[i].set(v)  # noqa: E731
        taken = jax.vmap(jax.vmap(put))(index, valid)
        mask = taken.transpose(2, 0, 1) if position else taken.swapaxes(1, 2).reshape(batch, seq, experts)
        least = _mean_of_finite(jnp.where(valid, best, jnp.inf).min(-1))
        return mask, {"most_per_batch": capacity * (seq if position else 1)}, least

    def _first_above(
        self, ranked: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, int], jax.Array, jax.Array]:
        """The first tokens of each sequence above the running threshold; the least score that top-k would have taken;
        the tokens above the threshold that come too late."""
        if context.limit is not None:
            raise RecipeError(
                "router.select=threshold takes what is above a threshold, whatever a sequence's number of experts per "
                "token: set select=top"
            )
        # The room is that of the padded length: a real length would tell a token how many follow.
        seq = ranked.shape[1]
        capacity = self.capacity(seq)
        bound = min(seq, math.ceil(capacity * self.options.slack))
        above = ranked > self.threshold[...]
        mask = above & (jnp.cumsum(above, axis=1) <= bound)
        best, _ = top_of_sequences(ranked.swapaxes(1, 2), capacity)
        limit = self.options.takes(self.config, jnp.isfinite(ranked[..., 0]).sum(-1, dtype=jnp.int32))
        valid = jnp.isfinite(best) & (jnp.arange(capacity) < limit[:, None, None])
        least = _mean_of_finite(jnp.where(valid, best, jnp.inf).min(-1))
        return mask, {"most_per_sequence": bound}, least, above & ~mask

    def _alone(self, x: jax.Array, ranked: jax.Array) -> jax.Array:
        """Every token by itself, as in generation."""
        if reason := self.refuse_generation():
            raise RecipeError(reason)
        if self.predictor is not None:
            return (self._predicted(x) > 0) & jnp.isfinite(ranked)
        return ranked > self.threshold[...]

    def _predicted(self, x: jax.Array) -> jax.Array:
        assert self.predictor is not None
        return scored(jax.lax.stop_gradient(x).astype(jnp.float32), self.predictor[...])

    def _weights(self, logits: jax.Array, probabilities: jax.Array, mask: jax.Array) -> jax.Array:
        """f32[batch, seq, experts], 0 where not taken."""
        match self.options.score:
            case "softmax":
                weights = jnp.where(mask, probabilities, 0.0)
            case "selected":
                weights = softmax_over(logits, mask)
            case _:
                weights = jnp.where(mask, jax.nn.sigmoid(logits), 0.0)
                weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        if self.table:
            weights = weights * jnp.asarray(self.table, jnp.float32)[mask.sum(-1)][..., None]
        return weights * self.options.route_scale


class _Within(NamedTuple):
    """Tokens taken from each sequence: positions i32[batch, experts, n], those that hold one bool alike, and the least
    score f32[experts]. Where sequences share rows, how, and the pairs that were wanted before that."""

    position: jax.Array
    valid: jax.Array
    least: jax.Array
    wanted: jax.Array | None = None
    shared: Shared | None = None


def top_tokens(scores: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(best scores f32[..., capacity] in descending order, their indices i32) of the last axis."""
    number = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    negated, index = jax.lax.sort((-scores, number), num_keys=1, is_stable=True)
    return -negated[..., :capacity], index[..., :capacity]


def top_of_sequences(scores: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The same for scores f32[batch, ..., tokens] of which each device has its own sequences."""
    # lax.top_k is three times as fast as a sort, but XLA partitions it over no axis: on a mesh it has to be local.
    return sharded(lambda s: tuple(jax.lax.top_k(s, capacity)), [("batch",)], (("batch",), ("batch",)))(scores)


def _mask_of(index: jax.Array, valid: jax.Array, seq: int) -> jax.Array:
    """bool[batch, seq, experts] of positions i32[batch, experts, n]."""
    put = lambda i, v: jnp.zeros(seq, jnp.int32).at[i].add(v)  # noqa: E731
    return (jax.vmap(jax.vmap(put))(index, valid.astype(jnp.int32)) > 0).swapaxes(1, 2)


def _mean_of_finite(least: jax.Array) -> jax.Array:
    """f32[groups..., experts], infinite where an expert took nothing -> f32[experts], 0 where it never took any."""
    finite, axes = jnp.isfinite(least), tuple(range(least.ndim - 1))
    return jnp.where(finite, least, 0.0).sum(axes) / jnp.maximum(finite.sum(axes), 1)


def _popularity(logits: jax.Array, mask: jax.Array, present: jax.Array | None, whole: bool, pairs: float) -> Summed:
    """sum_t (sum_e softmax over tokens of l_te) n_t / pairs, over each sequence or the `whole` batch; mean (EC-DLM)."""
    logits, taken = grouped(logits, whole), grouped(mask.sum(-1).astype(jnp.float32), whole)
    if present is not None:
        # Finite, so that a sequence without tokens has a gradient; nobody takes an absent token.
        logits = jnp.where(grouped(present, whole)[..., None], logits, -1e9)
    popularity = jax.nn.softmax(logits, axis=1).sum(-1)
    return averaged((popularity * taken).sum(-1) / pairs, None)
