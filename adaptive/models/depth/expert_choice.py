"""Expert choice over depth: each recursion picks the positions it computes (MoR paper, section 2.2)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.call import Call
from adaptive.layers.router import Network, Router, matmuls
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.models.depth import (
    Carried,
    Core,
    Depth,
    DepthModule,
    Item,
    Routed,
    capacities,
    check_shares,
    everyone,
    falling,
    replayed,
)
from adaptive.parallel.rows import add_rows, select_top, take_rows
from adaptive.parallel.rules import even, whole_rows
from adaptive.routing import expert_choice
from adaptive.routing.losses import mean_over, together
from adaptive.routing.rows import membership
from adaptive.routing.scores import passes as passes_threshold
from adaptive.routing.scores import scores_of
from adaptive.routing.types import Aux, AuxLosses, Selection, Summed, Trace
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Depth):
    """Each recursion's own router ranks the positions that reached the recursion before; the best of them go on."""

    capped: ClassVar[bool] = True
    single: ClassVar[bool] = True

    network: Network = "linear"  # of the router: d -> 1, d -> 2d -> 1, d -> 4d -> 1
    activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    alpha: float = 0.1  # the gate is alpha * activation(logit)
    temperature: float = ranged(1.0, above=0)  # divides the router's input
    gating: Literal["weighted", "additive"] = "weighted"  # additive: the gate does not scale the update
    random: bool = False  # ablation: uniform random scores
    capacities: tuple[float, ...] = ()  # share of the row per recursion; () is (N_r - r + 1) / N_r
    sampling: Literal["aux_loss", "aux_router", "none"] = "aux_loss"  # what makes the choice causal when sampling
    aux_coefficient: float = ranged(0.001, least=0)  # of the loss that sampling=aux_loss adds
    z_coefficient: float = ranged(0.0, least=0)
    capacity_warmup_steps: int = ranged(0, least=0)

    def build(self, passes: int, site: Site, keys: Iterator[jax.Array]) -> "ExpertChoice":
        return ExpertChoice(self, passes, site, keys)

    def check(self, recursive: Any, at: str) -> None:
        check_shares(self.fractions(recursive.recursions), recursive, at)

    def fractions(self, passes: int) -> tuple[float, ...]:
        return self.capacities or falling(passes)

    def warmup_steps(self) -> int:
        return self.capacity_warmup_steps

    def rules_differ(self) -> bool:
        return True

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        if self.sampling == "aux_loss" and not self.random:
            return {}
        return {"aux_coefficient": "random=true" if self.random else f"sampling={self.sampling} adds no such loss"}

    def parameters(self, passes: int, width: int) -> int:
        return passes * (2 if self.sampling == "aux_router" else 1) * sum(matmuls(self.network, width, 1))

    def router_flops(self, r: int, passes: int, candidates: float, width: int) -> tuple[float, float]:
        sizes = matmuls(self.network, width, 1)
        forward = 2.0 * candidates * sum(sizes)
        # Whether any loss reaches the main router: through the gate, or through a loss on its logits.
        gate = self.gating == "weighted" and not self.random
        learns = gate or self.z_coefficient > 0 or (self.sampling == "aux_loss" and not self.random)
        train = forward * (3 if learns else 1)
        if self.sampling != "aux_router":
            return forward, train
        # Its input is cut off from the gradient, which spares the first matmul's input gradient.
        return 2 * forward, train + 3 * forward - 2.0 * candidates * sizes[0]


class ExpertChoice(DepthModule):
    """A router per recursion and, with sampling=aux_router, another that learns to decide alone."""

    def __init__(self, settings: Settings, passes: int, site: Site, keys: Iterator[jax.Array]):
        s = self.settings = settings
        self.passes = passes

        def router(temperature: float, group: str) -> Router:
            return Router(site.width, 1, s.network, temperature=temperature, std=site.std, key=next(keys), group=group)

        self.routers = nnx.List([router(s.temperature, "main") for _ in range(passes)])
        # The temperature is the main router's alone (released code, expert_choice_router.py).
        auxiliary = passes if s.sampling == "aux_router" else 0
        self.aux_routers = nnx.List([router(1.0, "auxiliary") for _ in range(auxiliary)])

    def __call__(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        run = self._causal if call.rule == "causal" else self._top
        return run(core, x, where, call, carried)

    def _top(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        """Each recursion computes its top-k among the previous recursion's tokens, over the whole row.

        The stream of the candidates stays compact from one recursion to the next: one gather and one scatter each.
        """
        s, n, seq, step = self.settings, call.at_most(self.passes), x.shape[1], call.step
        shares = s.fractions(self.passes)[:n]
        warming = step is not None and s.capacity_warmup_steps > 0
        exists = where.present()
        counts = None if where.exists is None else where.counts()
        out, stream, positions, candidates = x, x, None, exists
        log, each = _Log(s, n, x.shape[:2]), []
        for r, most in enumerate((seq,) * n if warming else capacities(shares, seq)):
            logits, capacity = whole_rows(self.routers[r](stream)[..., 0]), even(most)
            limit: Any = None
            if step is not None and warming:
                limit = expert_choice.capacity_limit(shares[r], seq, step, s.capacity_warmup_steps)
            if counts is not None:
                limit = expert_choice.limit_of_counts(shares[r], counts, seq, limit)
            elif limit is None and capacity > most:
                limit = most
            gates, ranking = scores_of(logits, s.activation, s.alpha), None
            if s.random:
                key = call.key if call.key is not None else jax.random.key(0)
                ranking = jax.random.uniform(jax.random.fold_in(key, r), logits.shape)
                gates = 0.1 * ranking
            if (taken := replayed(call, r)) is not None:
                own = taken if positions is None else take_rows(taken, positions)
                ranking = jnp.where(own, logits if ranking is None else ranking, -jnp.inf)
            decision = None
            if self.aux_routers:
                decision = whole_rows(self.aux_routers[r](jax.lax.stop_gradient(stream))[..., 0])
            choice = expert_choice.choose(
                logits, gates, capacity, ranking=ranking, decision=decision, candidates=candidates, limit=limit,
                select=select_top,
            )  # fmt: skip
            log = log.chose(r, choice, logits if decision is None else decision, positions, candidates)

            picked = choice.selection
            h = stream if capacity == stream.shape[1] else take_rows(stream, picked.indices)
            absolute = picked.indices if positions is None else take_rows(positions, picked.indices)
            selection = picked._replace(indices=absolute)
            partial = None if candidates is None and limit is None else picked.valid
            h_new, carried, told = core(r, h, where.take(absolute, partial), call, carried)
            update = gated(h_new, selection, s.gating)
            out = out + update if absolute.shape[1] == seq else add_rows(out, absolute, update)
            log = log.took(selection, partial)
            each.append(told)
            stream, positions, candidates = h + update, absolute, partial
        return Routed(out, carried, log.aux(), log.trace(exists), each)

    def _causal(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        """Each token decides alone, by its router's threshold, whether it goes on: blind to the future.

        The first recursion is unconditional, and a token that stopped stays out. Runs every position under a mask, so
        it is exact for any number of takers and saves nothing. The auxiliary routers decide where the model has them.
        """
        s, n, exists = self.settings, call.at_most(self.passes), where.present()
        active = jnp.ones(x.shape[:2], bool) if exists is None else exists
        log, each = _Log(s, n, x.shape[:2]), []
        for r in range(n):
            logits = self.routers[r](x)[..., 0]
            decision = self.aux_routers[r](x)[..., 0] if self.aux_routers else logits
            log = log.scored(decision, active)
            if (taken := replayed(call, r)) is not None:
                active = active & taken
            elif r > 0:
                active = active & passes_threshold(decision)
            gates = jnp.where(active, scores_of(logits, s.activation, s.alpha), 0.0)
            selection = everyone(where, gates, active)
            new, carried, told = core(r, x, where.only(active), call, carried)
            x = x + gated(new, selection, s.gating)
            log = log.took(selection, active)
            each.append(told)
        return Routed(x, carried, AuxLosses(), log.trace(exists), each)

    def entered(self, x: jax.Array) -> Item:
        return Item(x)

    def passed(self, r: jax.Array, item: Item, new: jax.Array) -> tuple[Item, jax.Array]:
        s, x = self.settings, item.x
        gates = scores_of(_of_pass(self.routers, r, x), s.activation, s.alpha)
        picked = Selection(jnp.zeros_like(r)[:, None], gates, jnp.ones(gates.shape, bool))
        x = x + gated(new, picked, s.gating)
        deciding = self.aux_routers if len(self.aux_routers) else self.routers
        goes = passes_threshold(_of_pass(deciding, jnp.minimum(r + 1, self.passes - 1), x))[:, 0]
        return Item(x), goes & (r + 1 < self.passes)


def _of_pass(routers: nnx.List, r: jax.Array, x: jax.Array) -> jax.Array:
    """f32[n, 1]: logits of x [n, 1, width] by the router of each token's pass r i32[n]. All are asked: they are
    small."""
    logits = jnp.concatenate([router(x) for router in routers], axis=-1)
    return jnp.take_along_axis(logits, r[:, None, None], axis=-1)[..., 0]


def gated(f: jax.Array, selection: Selection, gating: str) -> jax.Array:
    """What a selected position's stream grows by: gate * f, in float32 before the cast; nothing at empty slots."""
    gate = selection.weights if gating == "weighted" else selection.valid.astype(jnp.float32)
    return (gate[..., None] * f.astype(jnp.float32)).astype(f.dtype)


@dataclasses.dataclass(frozen=True)
class _Log:
    """What the recursions decided so far; each method gives a new one."""

    settings: Settings
    passes: int
    shape: tuple[int, ...]
    depth: Any = 0
    losses: tuple[dict[str, Summed], ...] = ()
    scalars: tuple[tuple[str, jax.Array], ...] = ()
    selections: tuple[Selection, ...] = ()
    scores: tuple[jax.Array, ...] = ()

    def chose(
        self,
        r: int,
        choice: expert_choice.Choice,
        decision: jax.Array,
        positions: jax.Array | None,
        candidates: jax.Array | None,
    ) -> "_Log":
        named = tuple((f"{name}_{r + 1}", value) for name, value in choice.scalars.items())
        scores = jax.nn.sigmoid(jax.lax.stop_gradient(decision))
        if candidates is not None:
            scores = jnp.where(candidates, scores, jnp.nan)
        if positions is not None:
            scores = jax.vmap(lambda i, s: jnp.full(self.shape[1], jnp.nan, jnp.float32).at[i].set(s))(
                positions, scores
            )
        return dataclasses.replace(
            self,
            losses=(*self.losses, choice.losses),
            scalars=(*self.scalars, *named),
            scores=(*self.scores, scores),
        )

    def scored(self, decision: jax.Array, active: jax.Array) -> "_Log":
        return dataclasses.replace(self, scores=(*self.scores, jnp.where(active, jax.nn.sigmoid(decision), jnp.nan)))

    def took(self, selection: Selection, valid: jax.Array | None) -> "_Log":
        whole = valid is None and selection.indices.shape[1] == self.shape[1]
        more = 1 if whole else membership(selection, self.shape[1]).astype(jnp.int32)
        depth = jnp.zeros(self.shape, jnp.int32) + self.depth + more
        return dataclasses.replace(self, depth=depth, selections=(*self.selections, selection))

    def aux(self) -> AuxLosses:
        s, losses = self.settings, AuxLosses()
        if s.sampling != "none" and not s.random:
            apart = s.sampling == "aux_router"
            losses["aux_loss"] = Aux(self._summed("aux_loss"), 1.0 if apart else s.aux_coefficient, separate=apart)
        if s.z_coefficient:
            losses["z_loss"] = Aux(self._summed("z_loss"), s.z_coefficient)
        return losses

    def _summed(self, name: str) -> Summed:
        return together([step[name] for step in self.losses])

    def trace(self, exists: jax.Array | None) -> Trace:
        scalars = dict(self.scalars)
        if self.losses:
            each = (scalars[f"accuracy_{r + 1}"] for r in range(self.passes))
            scalars["accuracy"] = sum(each, start=jnp.zeros((), jnp.float32)) / self.passes
        scalars["mean_depth"] = mean_over(self.depth.astype(jnp.float32), exists)
        return Trace(self.depth, self.selections, scalars, self.scores)
