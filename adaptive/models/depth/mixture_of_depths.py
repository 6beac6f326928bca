"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): every second block computes a few tokens alone.

A pass of the recursion is a block here: give the core one block, as many recursions as the model is to have blocks, and
parameters of its own to each (shared="none"). In every `every`-th pass a router ranks all tokens of the row; the best
attend among themselves, and what the block adds to them is multiplied by the router's sigmoid. All others pass by.
Ranking compares a token with later ones, so a predictor learns to decide alone, and does while generating.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.site import Site, normal_param
from adaptive.layers.where import Where
from adaptive.models.depth import Carried, Core, Depth, DepthModule, Routed, everyone, replayed
from adaptive.parallel.rows import add_rows, select_top, take_rows
from adaptive.parallel.rules import even, whole_rows
from adaptive.routing.expert_choice import chosen_of, limit_of_counts
from adaptive.routing.losses import mean_over, of_calls, sampling_loss
from adaptive.routing.rows import membership
from adaptive.routing.types import Aux, AuxLosses, Selection, Trace
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Depth):
    """Every `every`-th pass computes `share` of the row."""

    share: float = ranged(0.125, above=0, most=1)  # the paper's best, in alternate blocks
    every: int = ranged(2, least=2)

    def build(self, passes: int, site: Site, keys: Iterator[jax.Array]) -> "MixtureOfDepths":
        return MixtureOfDepths(self, passes, site, keys)

    def check(self, recursive: Any, at: str) -> None:
        if recursive.recursions % self.every:
            raise RecipeError(f"{at}.every={self.every} does not divide the {recursive.recursions} recursions")
        if recursive.keys_values != "per_recursion":
            raise RecipeError(f"{at}=mixture_of_depths needs keys_values=per_recursion, not {recursive.keys_values}")

    def fractions(self, passes: int) -> tuple[float, ...]:
        return ((1.0,) * (self.every - 1) + (self.share,)) * (passes // self.every)

    def parameters(self, passes: int, width: int) -> int:
        return 2 * width * (passes // self.every)

    def router_flops(self, r: int, passes: int, candidates: float, width: int) -> tuple[float, float]:
        forward = 4.0 * candidates * width if (r + 1) % self.every == 0 else 0.0
        return forward, 2.5 * forward  # the predictor's input is cut off from the gradient

    def rules_differ(self) -> bool:
        return True


class MixtureOfDepths(DepthModule):
    """router, predictor  f32[routed passes, width, 1]"""

    def __init__(self, settings: Settings, passes: int, site: Site, keys: Iterator[jax.Array]):
        self.settings, self.groups = settings, passes // settings.every
        shape, stack = (site.width, 1), (self.groups,)
        self.router = normal_param(next(keys), shape, (None, None), site.std, stack)
        self.predictor = normal_param(next(keys), shape, (None, None), site.std, stack, group="auxiliary")

    def __call__(self, core: Core, x: jax.Array, where: Where, call: Call, carried: Carried) -> Routed:
        s = self.settings
        routed = self._causal if call.rule == "causal" else self._top

        def group(carry: Any, scanned: Any) -> Any:
            x, depth, carried = carry
            number, router, predictor = scanned
            told = []
            for i in range(s.every - 1):
                x, carried, own = core(number * s.every + i, x, where, call, carried)
                told.append(own)
            r = number * s.every + s.every - 1
            logits = whole_rows((x.astype(jnp.float32) @ router)[..., 0])
            decision = whole_rows((jax.lax.stop_gradient(x).astype(jnp.float32) @ predictor)[..., 0])
            x, state, own, selection, stats = routed(core, r, x, where, call, carried, logits, decision)
            depth = depth + s.every - 1 + membership(selection, x.shape[1])
            return (x, depth, carried._replace(state=state)), ([*told, own], selection, stats)

        start = x, jnp.zeros(where.shape, jnp.int32), carried
        scanned = jnp.arange(self.groups, dtype=jnp.int32), self.router[...], self.predictor[...]
        (x, depth, carried), (told, selections, stats) = jax.lax.scan(group, start, scanned)
        at = lambda tree, g: jax.tree.map(lambda a: a[g], tree)  # noqa: E731
        each = [at(own, g) for g in range(self.groups) for own in told]
        aux = AuxLosses()
        if "loss" in stats:
            aux["predictor_loss"] = Aux(of_calls(stats.pop("loss"), mean=False), 1.0, separate=True)
        mean_depth = mean_over(depth.astype(jnp.float32), where.present())
        scalars = {name: value.mean() for name, value in stats.items()} | {"mean_depth": mean_depth}
        trace = Trace(depth, tuple(at(selections, g) for g in range(self.groups)), scalars)
        return Routed(x, carried, aux, trace, each)

    def _top(
        self, core: Core, r: Any, x: jax.Array, where: Where, call: Call, carried: Carried, logits: Any, decision: Any
    ) -> tuple[jax.Array, Any, Any, Selection, dict[str, Any]]:
        """The best of the row, computed among themselves."""
        n, exists, share = x.shape[1], where.present(), self.settings.share
        most = max(1, int(share * n))
        capacity = even(most)
        limit: Any = most if capacity > most else None
        if where.exists is not None:
            limit = limit_of_counts(share, where.counts(), n, None)
        ranking = logits if exists is None else jnp.where(exists, logits, -jnp.inf)
        if (taken := replayed(call, r // self.settings.every)) is not None:
            ranking = jnp.where(taken, ranking, -jnp.inf)
        selection = select_top(ranking, jax.nn.sigmoid(logits), capacity, limit)
        h = take_rows(x, selection.indices)
        partial = None if exists is None and limit is None else selection.valid
        new, after, told = core(r, h, where.take(selection.indices, partial), call, carried)
        chosen = chosen_of(selection, n)
        stats = {
            "loss": sampling_loss(decision, chosen, exists),
            "predictor_accuracy": mean_over(((decision > 0) == chosen).astype(jnp.float32), exists),
        }
        return add_rows(x, selection.indices, _gated(new, h, selection)), after.state, told, selection, stats

    def _causal(
        self, core: Core, r: Any, x: jax.Array, where: Where, call: Call, carried: Carried, logits: Any, decision: Any
    ) -> tuple[jax.Array, Any, Any, Selection, dict[str, Any]]:
        """Those that the predictor names, every position under a mask: exact for any number of them."""
        exists = where.present()
        taken = replayed(call, r // self.settings.every)
        active = decision > 0 if taken is None else taken
        active = active if exists is None else active & exists
        selection = everyone(where, jnp.where(active, jax.nn.sigmoid(logits), 0.0), active)
        new, after, told = core(r, x, where.only(active), call, carried)
        return x + _gated(new, x, selection), after.state, told, selection, {}


def _gated(new: jax.Array, old: jax.Array, selection: Selection) -> jax.Array:
    """What the block added, times the gate, in float32 before the cast; nothing at empty slots."""
    added = new.astype(jnp.float32) - old.astype(jnp.float32)
    return (selection.weights[..., None] * added).astype(old.dtype)
