"""Token choice over depth: each token decides its depth before the first recursion (MoR paper, section 2.2)."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from adaptive.layers.call import Call, Tales
from adaptive.layers.router import Network, Router, matmuls
from adaptive.layers.site import Buffer, Site
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
from adaptive.parallel.rows import add_rows, select_first, take_rows
from adaptive.parallel.rules import even, whole_rows
from adaptive.routing import token_choice
from adaptive.routing.expert_choice import limit_of_counts
from adaptive.routing.losses import mean_over, updated_bias
from adaptive.routing.rows import membership
from adaptive.routing.scores import scores_of
from adaptive.routing.types import Aux, AuxLosses, Selection, Trace
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Depth):
    """One router gives each token its number of recursions."""

    stops: ClassVar[bool] = True
    capped: ClassVar[bool] = True
    single: ClassVar[bool] = True

    network: Network = "linear"  # of the router: d -> N_r, d -> 2d -> N_r, d -> 4d -> N_r
    activation: Literal["softmax", "sigmoid"] = "softmax"
    alpha: float = 1.0  # the gate is alpha * activation(logits)
    temperature: float = ranged(1.0, above=0)  # divides the router's input
    gating: Literal["weighted", "additive"] = "weighted"  # additive: the gate does not scale the update
    random: bool = False  # ablation: random logits
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_coefficient: float = ranged(0.1, least=0)  # of balancing=loss
    bias_update_rate: float = ranged(0.001, least=0)  # of balancing=loss_free
    balance_warmup_steps: int = ranged(0, least=0)  # steps in which every token takes every recursion
    z_coefficient: float = ranged(0.0, least=0)
    execution: Literal["masked", "capacity"] = "masked"  # masked is exact; capacity computes at most `capacities`
    capacities: tuple[float, ...] = ()  # of execution=capacity: share of the row per recursion; () as in expert choice

    def build(self, passes: int, site: Site, keys: Iterator[jax.Array]) -> "TokenChoice":
        return TokenChoice(self, passes, site, keys)

    def check(self, recursive: Any, at: str) -> None:
        check_shares(self.fractions(recursive.recursions), recursive, at)

    def fractions(self, passes: int) -> tuple[float, ...]:
        return (1.0,) * passes if self.execution == "masked" else self.paper_fractions(passes)

    def paper_fractions(self, passes: int) -> tuple[float, ...]:
        """Perfectly balanced, as expert choice."""
        return self.capacities or falling(passes)

    def warmup_steps(self) -> int:
        return self.balance_warmup_steps

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        found = {}
        if self.balancing != "loss":
            found["balance_coefficient"] = f"balancing={self.balancing} adds no loss"
        if self.balancing != "loss_free":
            found["bias_update_rate"] = f"balancing={self.balancing} has no bias"
        if self.execution != "capacity":
            found["capacities"] = f"execution={self.execution} computes every token that goes on"
        return found

    def parameters(self, passes: int, width: int) -> int:
        return sum(matmuls(self.network, width, passes))

    def router_flops(self, r: int, passes: int, candidates: float, width: int) -> tuple[float, float]:
        if r > 0 or self.random:
            return 0.0, 0.0
        forward = 2.0 * candidates * sum(matmuls(self.network, width, passes))
        learns = self.gating == "weighted" or self.z_coefficient > 0 or self.balancing == "loss"
        return forward, forward * (3 if learns else 1)


class TokenChoice(DepthModule):
    """The router and, with balancing=loss_free, a bias on its choice."""

    def __init__(self, settings: Settings, passes: int, site: Site, keys: Iterator[jax.Array]):
        s = self.settings = settings
        self.passes = passes
        self.router = Router(site.width, passes, s.network, temperature=s.temperature, std=site.std, key=next(keys))
        self.bias = Buffer(jnp.zeros(passes, jnp.float32), axes=(None,)) if s.balancing == "loss_free" else None

    def update(self, load: jax.Array | None) -> None:
        if self.bias is not None and load is not None:
            self.bias[...] = updated_bias(self.bias[...], load, self.settings.bias_update_rate)

    def __call__(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        """An unfinished token continues ungated; a finished one adds its gated output to the stream it entered with.

        `masked` execution, and the causal rule, run every position under a mask: exact, saves nothing. `capacity`
        execution computes at most the capacities, first come first served along the row; a token that finds no slot
        stops at its last completed recursion, and is counted.
        """
        s, exists = self.settings, where.present()
        logits = self.router(x)
        if s.random:
            logits = jax.random.normal(call.key if call.key is not None else jax.random.key(0), logits.shape)
        full_depth = False if call.step is None else call.step < s.balance_warmup_steps
        masked = call.rule == "causal" or s.execution == "masked"
        decided = self._decided(logits, exists, full_depth, self._replayed(call, logits, masked))
        decided = decided._replace(depth=jnp.minimum(decided.depth, call.at_most(self.passes) - 1))
        run = self._masked if masked else self._capacity
        out, depth, selections, overflow, carried, each = run(core, decided, x, where, call, carried)
        aux = AuxLosses()
        if s.balancing == "loss":
            aux["balancing_loss"] = Aux(decided.losses["balancing_loss"], s.balance_coefficient)
        if s.z_coefficient:
            aux["z_loss"] = Aux(decided.losses["z_loss"], s.z_coefficient)
        mean_depth = mean_over(depth.astype(jnp.float32), exists)
        scalars = {**decided.scalars, "mean_depth": mean_depth, "overflow": overflow}
        scores = tuple(jax.nn.softmax(logits, axis=-1)[..., i] for i in range(self.passes))
        return Routed(out, carried, aux, Trace(depth, selections, scalars, scores, decided.tokens), each)

    def entered(self, x: jax.Array) -> Item:
        decided = self._decided(self.router(x))
        return Item(x, (x, decided.depth[:, 0], self._gate(decided)))

    def passed(self, r: jax.Array, item: Item, new: jax.Array) -> tuple[Item, jax.Array]:
        return item._replace(x=new), item.kept[1] > r

    def left(self, item: Item) -> jax.Array:
        x, _, gate = item.kept
        return (x.astype(jnp.float32) + gate[..., None] * item.x.astype(jnp.float32)).astype(x.dtype)

    def _decided(
        self,
        logits: jax.Array,
        exists: jax.Array | None = None,
        full_depth: jax.Array | bool = False,
        depth: jax.Array | None = None,
    ) -> token_choice.Depths:
        s = self.settings
        scores = scores_of(logits, s.activation, s.alpha)
        bias = None if self.bias is None else self.bias[...]
        return token_choice.decide(logits, scores, bias, where=exists, full_depth=full_depth, depth=depth)

    def _replayed(self, call: Call, logits: jax.Array, masked: bool) -> jax.Array | None:
        """i32[rows, n], as `Depths.depth`, of what is replayed; None: nothing is. Under capacities a token may have
        wanted more than it got, and what it adds is scaled by that."""
        taken = [own for r in range(self.passes) if (own := replayed(call, r)) is not None]
        if not taken:
            return None
        depth = jnp.maximum(sum(own.astype(jnp.int32) for own in taken) - 1, 0)
        return depth if masked else jnp.maximum(depth, self._decided(logits).depth)

    def _gate(self, decided: token_choice.Depths) -> jax.Array:
        return decided.gate if self.settings.gating == "weighted" else jnp.ones_like(decided.gate)

    def _masked(
        self, core: Core, decided: token_choice.Depths, x: jax.Array, where: Where, call: Call, carried: Carried
    ) -> tuple[jax.Array, jax.Array, tuple[Selection, ...], jax.Array, Carried, list[Tales]]:
        h = out = x
        gate, exists, selections, each = self._gate(decided), where.present(), [], []
        for r in range(call.at_most(self.passes)):
            active = decided.depth >= r if exists is None else (decided.depth >= r) & exists
            selection = everyone(where, jnp.where(active, decided.gate, 0.0), active)
            new, carried, told = core(r, h, where.only(active), call, carried)
            leaves = (decided.depth == r)[..., None]
            exit_stream = (x.astype(jnp.float32) + gate[..., None] * new.astype(jnp.float32)).astype(x.dtype)
            out, h = jnp.where(leaves, exit_stream, out), jnp.where(active[..., None], new, h)
            selections.append(selection)
            each.append(told)
        return out, decided.depth + 1, tuple(selections), jnp.zeros((), jnp.float32), carried, each

    def _capacity(
        self, core: Core, decided: token_choice.Depths, x: jax.Array, where: Where, call: Call, carried: Carried
    ) -> tuple[jax.Array, jax.Array, tuple[Selection, ...], jax.Array, Carried, list[Tales]]:
        gate, seq, exists = self._gate(decided), x.shape[1], where.present()
        counts = None if where.exists is None else where.counts()
        shares = self.settings.fractions(self.passes)[: call.at_most(self.passes)]
        wants, h, reached = decided.depth, x, jnp.zeros(x.shape[:2], jnp.int32)
        present = jnp.ones(x.shape[:2], bool) if exists is None else exists
        selections, overflow, each = [], jnp.zeros((), jnp.float32), []
        for r, most in enumerate(capacities(shares, seq)):
            goes = wants >= r if (taken := replayed(call, r)) is None else taken
            asked, capacity = whole_rows(present & goes & (reached == r)), even(most)
            limit: Any = most if capacity > most else None
            if counts is not None:
                limit = limit_of_counts(shares[r], counts, seq, None)
            selection = select_first(asked, whole_rows(decided.gate), capacity, limit)
            got = membership(selection, seq)
            before = take_rows(h, selection.indices)
            new, carried, told = core(r, before, where.take(selection.indices, selection.valid), call, carried)
            h = add_rows(h, selection.indices, jnp.where(selection.valid[..., None], new - before, 0))
            reached = reached + got
            overflow = overflow + mean_over((asked & ~got).astype(jnp.float32), exists)
            selections.append(selection)
            each.append(told)
        done = (x.astype(jnp.float32) + gate[..., None] * h.astype(jnp.float32)).astype(x.dtype)
        out = jnp.where((reached > 0)[..., None], done, x)
        return out, reached, tuple(selections), overflow, carried, each
