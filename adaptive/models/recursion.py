"""The middle of a recursive model: a shared block applied several times, to all tokens or to those a router chooses.

Each strategy takes the residual stream that enters the recursion and returns the stream that leaves it with what was
decided (`Routed`). `Steps` knows the keys and values; the strategies know the routing.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from adaptive.layers.attention import KeyValues, Memory, Rows, replaced
from adaptive.layers.rope import Rope
from adaptive.layers.router import Router
from adaptive.models.config import RouterConfig, TransformerConfig
from adaptive.routing import expert_choice, token_choice
from adaptive.routing.losses import mean_over
from adaptive.routing.rows import add_rows, membership, take_rows
from adaptive.routing.scores import passes, scores_of
from adaptive.routing.select import select_first
from adaptive.routing.types import Aux, AuxLosses, Selection, Trace


class Routed(NamedTuple):
    """The stream [batch, n, width] after the recursion, auxiliary losses and trace."""

    x: jax.Array
    aux: AuxLosses
    trace: Trace


class Block(Protocol):
    """The shared block: (recursion, stream, rows, memory of all its layers) -> (stream, keys and values of all)."""

    def __call__(
        self, r: int, x: jax.Array, rows: Rows, memory: Memory | None, *, keep: bool
    ) -> tuple[jax.Array, KeyValues | None]: ...


class Steps:
    """Applies the block at successive recursions, with keys and values by the model's policy (MoR paper, section 2.3).

    per_recursion  a token attends to the tokens of its own recursion
    shared         recursions after the first attend to the first one's keys and values, of all tokens
    hybrid         as shared, but the selected positions' keys and values are fresh, for that recursion alone
    """

    def __init__(self, block: Block, config: TransformerConfig, rows: Rows):
        """rows: all positions of the row, as the first recursion sees them."""
        self._block, self._policy, self._rows = block, config.kv, rows
        self._first: KeyValues | None = None

    def __call__(self, r: int, x: jax.Array, rows: Rows, selection: Selection | None) -> jax.Array:
        """x [batch, n, width] at `rows`, which `selection` (None: all) took from the whole row -> block(x)."""
        if self._policy == "per_recursion":
            return self._block(r, x, rows, None, keep=False)[0]
        if r == 0:
            x, self._first = self._block(r, x, rows, None, keep=True)
            return x
        assert self._first is not None
        update = selection if self._policy == "hybrid" else None
        return self._block(r, x, rows, Memory(self._first, self._rows, update), keep=False)[0]


class CachedSteps:
    """The same for new tokens that follow what a cache holds; `caches` is the cache with them, once all steps ran.

    caches  one KeyValues [layers, batch, length, kv_heads, head_dim] per recursion (shared: only the first)
    active  bool[recursions, batch, length]: which positions took each recursion
    """

    def __init__(
        self, block: Block, config: TransformerConfig, caches: list[KeyValues], active: jax.Array, own: Selection
    ):
        """own: places of the new tokens [batch, n] in the cache, and which of them exist."""
        self._block, self._policy = block, config.kv
        self.caches, self.active, self._own = list(caches), active, own
        length = active.shape[-1]
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), active.shape[1:])
        self._cache_rows = Rows(Rope(jnp.zeros(()), jnp.zeros(())), index)

    def __call__(self, r: int, x: jax.Array, rows: Rows, selection: Selection | None) -> jax.Array:
        where, everyone = self._own.indices, self._own
        taken = everyone.valid if selection is None else selection.valid
        self.active = self.active.at[r, jnp.arange(len(taken))[:, None], where].set(taken)
        if r > 0 and self._policy == "shared":
            return self._block(r, x, rows, Memory(self.caches[0], self._cache_rows), keep=False)[0]
        if r > 0 and self._policy == "hybrid":
            new = jax.vmap(lambda kv: KeyValues(take_rows(kv.k, where), take_rows(kv.v, where)))(self.caches[0])
            base = jax.vmap(replaced, in_axes=(0, 0, None))(self.caches[r], new, everyone)
            memory = Memory(base, self._cache_rows, everyone._replace(valid=taken))
        else:
            memory = Memory(self.caches[r], self._cache_rows._replace(valid=self.active[r]), everyone)
        x, kv = self._block(r, x, rows, memory, keep=True)
        assert kv is not None
        self.caches[r] = kv
        return x


Step = Callable[[int, jax.Array, Rows, Selection | None], jax.Array]


def all_tokens(steps: Step, config: TransformerConfig, x: jax.Array, rows: Rows) -> Routed:
    """Every token takes every recursion."""
    for r in range(config.recursions):
        x = steps(r, x, rows, None)
    depth = jnp.full(x.shape[:2], config.recursions if config.share_parameters else 1, jnp.int32)
    return Routed(x, AuxLosses(), Trace(depth))


class Routers(NamedTuple):
    """Main routers (one per recursion for expert choice, one for token choice), auxiliary routers, loss-free bias."""

    main: list[Router]
    auxiliary: list[Router]
    bias: jax.Array | None


def expert_choice_top(
    steps: Step,
    config: TransformerConfig,
    routers: Routers,
    x: jax.Array,
    rows: Rows,
    *,
    exists: jax.Array | None = None,
    counts: jax.Array | None = None,
    step: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Routed:
    """Each recursion computes its top-k among the previous recursion's tokens, over the whole sequence.

    x       [batch, seq, width]
    exists  bool[batch, seq]: positions that are no padding; None: all
    counts  i32[batch]: positions of each row whose shares the capacities are; None: all of the row
    step    i32[]: training step while a capacity warm-up lasts; None: capacities as configured
    key     PRNG key of the random-router ablation

    The stream of the candidates stays compact from one recursion to the next: one gather and one scatter each.
    """
    cfg, n = config.router, config.recursions
    seq = x.shape[1]
    warming = step is not None and cfg.capacity_warmup_steps > 0
    capacities = (seq,) * n if warming else config.capacities(seq)
    out, stream, positions, candidates = x, x, None, exists
    log = _ExpertChoiceLog(cfg, n, x.shape[:2])
    for r, capacity in enumerate(capacities):
        logits = routers.main[r](stream)[..., 0]
        limit = None
        if step is not None and warming:
            limit = expert_choice.capacity_limit(config.capacity_fractions[r], seq, step, cfg.capacity_warmup_steps)
        if counts is not None:
            limit = expert_choice.limit_of_counts(config.capacity_fractions[r], counts, seq, limit)
        gates, ranking = scores_of(logits, cfg.activation, cfg.alpha), None
        if cfg.random:
            ranking = jax.random.uniform(
                jax.random.fold_in(key if key is not None else jax.random.key(0), r), logits.shape
            )
            gates = 0.1 * ranking
        decision = routers.auxiliary[r](jax.lax.stop_gradient(stream))[..., 0] if routers.auxiliary else None
        choice = expert_choice.choose(
            logits, gates, capacity, ranking=ranking, decision=decision, candidates=candidates, limit=limit
        )
        log.add(r, choice, logits if decision is None else decision, positions, candidates)

        picked = choice.selection
        everyone = capacity == stream.shape[1]
        h = stream if everyone else take_rows(stream, picked.indices)
        absolute = picked.indices if positions is None else take_rows(positions, picked.indices)
        selection = picked._replace(indices=absolute)
        partial = None if candidates is None and limit is None else picked.valid
        update = _gated(steps(r, h, rows_at(rows, absolute, partial), selection), selection, cfg)
        out = out + update if absolute.shape[1] == seq else add_rows(out, absolute, update)
        log.took(selection, partial)
        stream, positions, candidates = h + update, absolute, partial
    return Routed(out, log.aux(), log.trace())


def expert_choice_causal(
    steps: Step,
    config: TransformerConfig,
    routers: Routers,
    x: jax.Array,
    rows: Rows,
    *,
    exists: jax.Array | None = None,
) -> Routed:
    """Each token decides alone, by its router's threshold, whether it takes the next recursion: blind to the future.

    The first recursion is unconditional, and a token that stopped stays out. Runs every position under a mask, so it is
    exact for any number of takers and saves nothing. The auxiliary routers decide where the model has them.
    """
    cfg, n = config.router, config.recursions
    active = jnp.ones(x.shape[:2], bool) if exists is None else exists
    log = _ExpertChoiceLog(cfg, n, x.shape[:2])
    everywhere = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    for r in range(n):
        logits = routers.main[r](x)[..., 0]
        decision = routers.auxiliary[r](x)[..., 0] if routers.auxiliary else logits
        log.scored(decision, active)
        if r > 0:
            active = active & passes(decision)
        gates = jnp.where(active, scores_of(logits, cfg.activation, cfg.alpha), 0.0)
        selection = Selection(everywhere, gates, active)
        x = x + _gated(steps(r, x, rows._replace(valid=active), selection), selection, cfg)
        log.took(selection, active)
    return Routed(x, AuxLosses(), log.trace())


def token_choice_depths(
    steps: Step,
    config: TransformerConfig,
    routers: Routers,
    x: jax.Array,
    rows: Rows,
    *,
    exists: jax.Array | None = None,
    counts: jax.Array | None = None,
    step: jax.Array | None = None,
    key: jax.Array | None = None,
    exact: bool = False,
) -> Routed:
    """Each token decides its depth before the first recursion (MoR paper, section 2.2; released code).

    An unfinished token continues ungated; a finished one adds its gated output to the stream it entered with.
    `masked` execution runs every position under a mask: exact, saves nothing. `capacity` execution computes at most the
    capacities of the recipe, first come first served along the sequence; a token that finds no slot stops at its last
    completed recursion, and is counted. `exact` asks for masked execution whatever the recipe says (generation).
    Other arguments as in `expert_choice_top`.
    """
    cfg, n = config.router, config.recursions
    logits = routers.main[0](x)
    if cfg.random:
        logits = jax.random.normal(key if key is not None else jax.random.key(0), logits.shape)
    full_depth = False if step is None else step < cfg.balance_warmup_steps
    decided = token_choice.decide(
        logits, scores_of(logits, cfg.activation, cfg.alpha), routers.bias, where=exists, full_depth=full_depth
    )
    if exact or cfg.execution == "masked":
        out, depth, selections, overflow = _token_choice_masked(steps, config, decided, x, rows, exists)
    else:
        out, depth, selections, overflow = _token_choice_capacity(steps, config, decided, x, rows, exists, counts)
    aux = AuxLosses()
    if cfg.balancing == "loss":
        aux["balancing_loss"] = Aux(decided.losses["balancing_loss"], cfg.balance_coefficient)
    if cfg.z_coefficient:
        aux["z_loss"] = Aux(decided.losses["z_loss"], cfg.z_coefficient)
    scalars = {**decided.scalars, "mean_depth": depth.mean(dtype=jnp.float32), "overflow": overflow}
    scores = tuple(jax.nn.softmax(logits, axis=-1)[..., i] for i in range(n))
    return Routed(out, aux, Trace(depth, selections, scalars, scores, decided.load))


def _token_choice_masked(steps, config, decided, x, rows, exists):
    h = out = x
    gate = decided.gate if config.router.gating == "weighted" else jnp.ones_like(decided.gate)
    everywhere = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    selections = []
    for r in range(config.recursions):
        active = decided.depth >= r if exists is None else (decided.depth >= r) & exists
        selection = Selection(everywhere, jnp.where(active, decided.gate, 0.0), active)
        new = steps(r, h, rows._replace(valid=active), selection)
        leaves = (decided.depth == r)[..., None]
        exit_stream = (x.astype(jnp.float32) + gate[..., None] * new.astype(jnp.float32)).astype(x.dtype)
        out, h = jnp.where(leaves, exit_stream, out), jnp.where(active[..., None], new, h)
        selections.append(selection)
    return out, decided.depth + 1, tuple(selections), jnp.zeros((), jnp.float32)


def _token_choice_capacity(steps, config, decided, x, rows, exists, counts):
    gate = decided.gate if config.router.gating == "weighted" else jnp.ones_like(decided.gate)
    seq = x.shape[1]
    wants, out, h, reached = decided.depth, x, x, jnp.zeros(x.shape[:2], jnp.int32)
    present = jnp.ones(x.shape[:2], bool) if exists is None else exists
    selections, overflow = [], jnp.zeros((), jnp.float32)
    for r, capacity in enumerate(config.capacities(seq)):
        asked = present & (wants >= r) & (reached == r)
        fraction = config.capacity_fractions[r]
        limit = None if counts is None else expert_choice.limit_of_counts(fraction, counts, seq, None)
        selection = select_first(asked, decided.gate, capacity, limit)
        got = membership(selection, seq)
        new = steps(r, take_rows(h, selection.indices), rows_at(rows, selection.indices, selection.valid), selection)
        h = add_rows(
            h, selection.indices, jnp.where(selection.valid[..., None], new - take_rows(h, selection.indices), 0)
        )
        reached = reached + got
        overflow = overflow + mean_over((asked & ~got).astype(jnp.float32), exists)
        selections.append(selection)
    done = (x.astype(jnp.float32) + gate[..., None] * h.astype(jnp.float32)).astype(x.dtype)
    out = jnp.where((reached > 0)[..., None], done, out)
    return out, reached, tuple(selections), overflow


def rows_at(rows: Rows, indices: jax.Array, valid: jax.Array | None) -> Rows:
    """The rows at positions `indices` i32[batch, k]; `rows` itself, but for `valid`, where these are all of them."""
    if indices.shape[1] == rows.rope.cos.shape[1]:
        return rows._replace(valid=valid)
    rope = Rope(take_rows(rows.rope.cos, indices), take_rows(rows.rope.sin, indices))
    index = None if rows.index is None else take_rows(rows.index, indices)
    segments = None if rows.segments is None else take_rows(rows.segments, indices)
    return Rows(rope, index, segments, valid)


def _gated(f: jax.Array, selection: Selection, cfg: RouterConfig) -> jax.Array:
    """What a selected position's stream grows by: gate * f, in float32 before the cast; nothing at empty slots."""
    gate = selection.weights if cfg.gating == "weighted" else selection.valid.astype(jnp.float32)
    return (gate[..., None] * f.astype(jnp.float32)).astype(f.dtype)


class _ExpertChoiceLog:
    """Collects what the recursions decided into auxiliary losses and a trace."""

    def __init__(self, cfg: RouterConfig, recursions: int, shape: tuple[int, ...]):
        self._cfg, self._n, self._shape = cfg, recursions, shape
        self._losses: list[dict[str, jax.Array]] = []
        self._scalars: dict[str, jax.Array] = {}
        self._depth = jnp.zeros(shape, jnp.int32)
        self._selections: list[Selection] = []
        self._scores: list[jax.Array] = []

    def add(
        self,
        r: int,
        choice: expert_choice.Choice,
        decision: jax.Array,
        positions: jax.Array | None,
        candidates: jax.Array | None,
    ) -> None:
        self._losses.append(choice.losses)
        self._scalars |= {f"{name}_{r + 1}": value for name, value in choice.scalars.items()}
        scores = jax.nn.sigmoid(jax.lax.stop_gradient(decision))
        if candidates is not None:
            scores = jnp.where(candidates, scores, jnp.nan)
        if positions is not None:
            scores = jax.vmap(lambda i, s: jnp.full(self._shape[1], jnp.nan).at[i].set(s))(positions, scores)
        self._scores.append(scores)

    def scored(self, decision: jax.Array, active: jax.Array) -> None:
        self._scores.append(jnp.where(active, jax.nn.sigmoid(decision), jnp.nan))

    def took(self, selection: Selection, valid: jax.Array | None) -> None:
        self._selections.append(selection)
        everyone = valid is None and selection.indices.shape[1] == self._shape[1]
        self._depth += 1 if everyone else membership(selection, self._shape[1]).astype(jnp.int32)

    def aux(self) -> AuxLosses:
        cfg, losses = self._cfg, AuxLosses()
        if cfg.sampling != "none" and not cfg.random:
            value = self._summed("aux_loss")
            apart = cfg.sampling == "aux_router"
            losses["aux_loss"] = Aux(value, 1.0 if apart else cfg.aux_coefficient, separate=apart)
        if cfg.z_coefficient:
            losses["z_loss"] = Aux(self._summed("z_loss"), cfg.z_coefficient)
        return losses

    def _summed(self, name: str) -> jax.Array:
        return sum((step[name] for step in self._losses), start=jnp.zeros((), jnp.float32))

    def trace(self) -> Trace:
        scalars = dict(self._scalars)
        if self._losses:
            scalars["accuracy"] = (
                sum((scalars[f"accuracy_{r + 1}"] for r in range(self._n)), start=jnp.zeros((), jnp.float32)) / self._n
            )
        scalars["mean_depth"] = self._depth.mean(dtype=jnp.float32)
        return Trace(self._depth, tuple(self._selections), scalars, tuple(self._scores))
