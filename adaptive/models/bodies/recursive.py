"""A shared core that positions go through several times (MoR paper, section 2; looped and recursive transformers)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers import stack as stacks
from adaptive.layers.call import Call, Tales, below, stacked
from adaptive.layers.cost import CAPACITIES, Cost, Span, Taken
from adaptive.layers.keys_values import KeyValues, taken, written
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.moe.settings import MoESettings
from adaptive.layers.norm import RMSNorm
from adaptive.layers.remat import recomputed
from adaptive.layers.site import Site, is_variable, passes_of
from adaptive.layers.stack import Making, Shared, Stack
from adaptive.layers.state import State
from adaptive.layers.where import Where
from adaptive.models import kept, policies
from adaptive.models.bodies import Body, BodyModule, Line, Through
from adaptive.models.bodies.plain import scaled
from adaptive.models.depth import Carried, Depth, DepthModule
from adaptive.models.depth import all as all_tokens
from adaptive.models.needed import by_token, where_needed
from adaptive.models.policies import Policy, per_pass
from adaptive.models.policies import shared as first_pass
from adaptive.routing.types import AuxLosses, Trace
from adaptive.settings import ranged, since

KeysValues = Literal["per_recursion", "shared", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Settings(Body):
    """prelude, `recursions` passes through the core, coda. A strategy says which positions take a pass (`depth`).

    shared       what the passes have in common: all parameters, those of mixers alone, or none
    order        cycle: the core as a whole runs again and again; sequence: each of its layers does, in place
    keys_values  per_recursion: a position reads the positions of its own pass
                 shared: passes after the first read the first one's keys and values, of all positions
                 hybrid: as shared, but the selected positions' keys and values are fresh, for that pass alone
    cache        what generation keeps of the passes; no training reads it
    """

    prelude: stacks.Settings | None = None
    core: stacks.Settings = stacks.Settings()
    coda: stacks.Settings | None = None
    recursions: int = ranged(3, least=1, most=10_000)
    depth: Depth = all_tokens.Settings()
    shared: Shared = "all"
    order: Literal["cycle", "sequence"] = "cycle"
    keys_values: KeysValues = "per_recursion"
    cache: Policy = since(per_pass.Settings(), before={"kind": "per_pass"})

    @property
    def ends(self) -> tuple[stacks.Settings, ...]:
        return tuple(s for s in (self.prelude, self.coda) if s is not None)

    @property
    def layers(self) -> int:
        return self.recursions * self.core.layers + sum(s.layers for s in self.ends)

    @property
    def stored_layers(self) -> int:
        copies = self.recursions if self.shared == "none" else 1
        return copies * self.core.layers + sum(s.layers for s in self.ends)

    def warmup_steps(self) -> int:
        return self.depth.warmup_steps()

    def family(self) -> str:
        if not self.depth.equal_passes:
            return "mor" if self.depth.kind() in ("expert_choice", "token_choice") else self.depth.kind()
        return "recursive" if self.shared != "none" else "vanilla"

    def title(self) -> str:
        names = {"mor": "Mixture-of-Recursions", "recursive": "Recursive transformer", "vanilla": "Transformer"}
        return names.get(self.family(), super().title())

    def counted(self) -> int:
        """Passes that count as depth: those through parameters that are shared."""
        return self.recursions if self.shared != "none" or not self.depth.equal_passes else 1

    def check(self, width: int, at: str) -> None:
        for name in ("prelude", "core", "coda"):
            if (part := getattr(self, name)) is not None:
                part.check(width, f"{at}.{name}")
        attends = all(isinstance(b.mixer, Attention) for b in self.core.blocks)
        routed = not self.depth.equal_passes
        if self.keys_values != "per_recursion" and not attends:
            raise RecipeError(f"{at}.keys_values={self.keys_values}: only attention has keys and values to share")
        if self.keys_values == "hybrid" and self.depth.kind() != "expert_choice":
            raise RecipeError(
                f"{at}.keys_values=hybrid needs {at}.depth=expert_choice; use keys_values=shared or per_recursion"
            )
        if routed and self.recursions < 2:
            raise RecipeError(f"{at}.depth={self.depth.kind()} needs {at}.recursions of at least 2")
        experts = any(isinstance(b.feed_forward, MoESettings) for b in self.core.blocks)
        if self.order == "sequence" and (routed or len(self.core.blocks) > 1 or not attends or experts):
            raise RecipeError(
                f"{at}.order=sequence repeats each layer in place: it needs {at}.depth=all and one kind of block with "
                "attention and no experts; use order=cycle"
            )
        self.depth.check(self, f"{at}.depth")
        if reason := policies.refusal(self.cache, self):
            raise RecipeError(f"{at}.cache={self.cache.kind()}: {reason}")

    @property
    def policy(self) -> Policy:
        """What generation keeps of the passes: where they share keys and values by training, the first alone."""
        return first_pass.Settings() if self.keys_values == "shared" else self.cache

    def refuse_stages(self, stages: int, groups: int) -> str:
        return self.core.refuse_stages(stages, groups)

    def lines_up(self) -> bool:
        return self.depth.equal_passes

    def check_first_capacity(self, first: float, name: str, at: str) -> None:
        """Raises RecipeError where later passes read keys and values that a first pass did not compute."""
        if self.keys_values != "per_recursion" and first < 1:
            raise RecipeError(
                f"{name} starts with {first:g}: keys_values={self.keys_values} shares the first recursion's keys and "
                "values of all tokens, so the first share must be 1; or use keys_values=per_recursion"
            )

    @property
    def passes(self) -> int:
        return self.recursions

    def refuse_passes(self, passes: int | None = None) -> str:
        """Why a call cannot say that there are so many passes at most (None: a number that is not known before it
        runs); empty where it can."""
        if passes is not None and not self.depth.capped:
            return f"depth={self.depth.kind()} has blocks of its own in every pass: a call cannot leave some out"
        if passes is not None and passes < 1:
            return f"passes={passes}: there is at least 1"
        if passes is not None and passes <= self.recursions:
            return ""
        if not self.depth.equal_passes or self.order == "sequence":
            more = "" if passes is None else f" above the {self.recursions} of its settings"
            return (
                f"passes of a call{more} are of a core that repeats as a whole, all positions alike: depth=all, "
                "order=cycle"
            )
        if self.keys_values != "per_recursion":
            return "passes of a call are a loop of equal passes: keys_values=per_recursion"
        if passes is not None and self.shared != "all":
            return (
                f"passes={passes}: there are {self.recursions} with parameters of their own (shared={self.shared}); "
                "more need shared=all"
            )
        return ""

    def parameters(self, width: int) -> int:
        core = self.core.parameters(width, self.recursions, self.shared)
        return core + sum(end.parameters(width) for end in self.ends) + width + self.router_parameters(width)

    def unrolled_parameters(self, width: int) -> int:
        return dataclasses.replace(self, shared="none").parameters(width)

    def router_parameters(self, width: int) -> int:
        return self.depth.parameters(self.recursions, width)

    def pass_counts(self, positions: int) -> tuple[int, ...]:
        return () if self.depth.equal_passes else self.depth.counts(self.recursions, positions)

    def cost(self, width: int, positions: float, taken: Taken = CAPACITIES, stage: int = 0) -> tuple[Cost, ...]:
        counts = self.depth.counts(self.recursions, int(positions)) if taken.passes is None else taken.passes
        before = self.prelude.layers if self.prelude is not None else 0

        def end(part: stacks.Settings | None, name: str, first: int) -> tuple[Cost, ...]:
            if part is None:
                return ()
            own = part.cost(width, Span.whole(positions), first=first, depth=self.layers)
            return (dataclasses.replace(own, name=f"{name} layer{'s' * (part.layers > 1)}"),)

        return (
            *end(self.prelude, "first", 0),
            *(self._pass_cost(r, width, positions, counts, before) for r in range(self.recursions)),
            *end(self.coda, "last", before + self.recursions * self.core.layers),
        )

    def _pass_cost(self, r: int, width: int, positions: float, counts: Sequence[float], first: int) -> Cost:
        """FLOPs of pass r of a core whose first layer is number `first` in the first pass; counts: positions that each
        computes."""
        reuses = r > 0 and self.keys_values != "per_recursion"
        own_keys = not reuses or self.keys_values == "hybrid"
        span = Span(counts[r], counts[0] if reuses else counts[r], positions, own_keys)
        candidates = counts[r - 1] if r else positions
        router, router_train = self.depth.router_flops(r, self.recursions, candidates, width)
        first += r * self.core.layers
        own = self.core.cost(width, span, first=first, depth=self.layers)
        own += Cost(router=router, router_train=router_train)
        # In place all uses of a layer are recomputed together.
        inside = self.order == "sequence" and r + 1 < self.recursions
        name = f"recursion {r + 1}" if self.recursions > 1 else "layers"
        return dataclasses.replace(own, name=name, recursion=r + 1, last=0.0 if inside else own.last)

    def build(
        self, site: Site, keys: Iterator[jax.Array], making: Making, *, stage: int = 0, additions: int = 0
    ) -> "Recursive":
        return Recursive(self, site, keys, making, additions)


class Recursive(BodyModule):
    """The network of prelude, core and coda, and the depth strategy with its routers."""

    def __init__(self, settings: Settings, site: Site, keys: Iterator[jax.Array], making: Making, additions: int):
        s = self.settings = settings
        self.making = making
        site = site._replace(depth=s.layers)
        additions += s.recursions * s.core.additions + sum(end.additions for end in s.ends)

        def part(own: stacks.Settings | None, first: int, **options: Any) -> Stack | None:
            if own is None:
                return None
            return Stack(
                own, scaled(site, own, additions), [next(keys) for _ in own.blocks], making, first=first, **options
            )

        before = s.prelude.layers if s.prelude is not None else 0
        self.prelude = part(s.prelude, 0)
        core = part(s.core, before, passes=s.recursions, shared=s.shared, in_stages=True)
        assert core is not None
        self.core = core
        self.coda = part(s.coda, before + s.recursions * s.core.layers)
        self.norm = RMSNorm(site.width, site.norm_eps)
        self.depth: DepthModule = s.depth.build(s.recursions, site, keys)

    def __call__(self, x: jax.Array, where: Where, call: Call, state: State | None = None) -> Through:
        s = self.settings
        before: dict[str, Any] = {} if state is None else state
        after: dict[str, Any] = {}
        told: Tales = {}
        if call.passes is not None:
            x, call = self._allowed(x, call)
        previous, first = call.previous, 0
        if self.prelude is not None:
            x, after["prelude"], own, previous = self.prelude(x, where, call, before.get("prelude"))
            told |= below("prelude", own)
            first = self.prelude.settings.layers
        call = call.replace(previous=previous)
        x, where = x.astype(self.core.stream), self.core.prepared(where)
        if s.order == "sequence" and s.recursions > 1:
            x = self._in_place(x, where, call)
            depth = call.at_most(s.recursions) if s.counted() > 1 else 1
            trace, aux = Trace(jnp.full(where.shape, depth, jnp.int32)), AuxLosses()
        else:
            core = _Core(self, where, first, cached=state is not None)
            start = Carried(before.get("core"), self.core.first_previous(x, call))
            routed = self.depth(core, x, where, call, start)
            x, (after["core"], previous), aux, trace = routed.x, routed.carried, routed.aux, routed.trace
            if s.counted() == 1:
                trace = trace._replace(depth=jnp.ones(where.shape, jnp.int32))
            told |= below("core", stacked(list(routed.told)) if s.recursions > 1 else _only(routed.told))
        if self.coda is not None:
            call = call.replace(previous=previous, layer=first + s.recursions * s.core.layers)
            x, after["coda"], own, _ = self.coda(x, where, call, before.get("coda"))
            told |= below("coda", own)
        keep = call.keep or state is not None
        x = self.norm(x).astype(self.making.dtype)
        return Through(x, after if keep else None, aux, trace._replace(told=told))

    def line(self) -> Line:
        s, first = self.settings, 0 if self.prelude is None else self.prelude.settings.layers

        def enter(x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, jax.Array | None, Tales]:
            told: Tales = {}
            if self.prelude is not None:
                x, _, own, previous = self.prelude(x, where, call)
                told, call = below("prelude", own), call.replace(previous=previous)
            x = x.astype(self.core.stream)
            return x, self.core.first_previous(x, call), told

        def leave(x: jax.Array, previous: jax.Array | None, where: Where, call: Call) -> tuple[jax.Array, Tales]:
            told: Tales = {}
            if self.coda is not None:
                call = call.replace(previous=previous, layer=first + s.recursions * s.core.layers)
                x, _, own, _ = self.coda(x, where, call)
                told = below("coda", own)
            return self.norm(x).astype(self.making.dtype), told

        return Line("core", self.core, s.recursions, first, enter, leave)

    def _allowed(self, x: jax.Array, call: Call) -> tuple[jax.Array, Call]:
        """The stream, where the network has the call's number of passes, and the call. Raises RecipeError where it has
        not; NaN where the number is traced and above that of passes with parameters of their own."""
        s, passes = self.settings, call.passes
        assert passes is not None
        traced = isinstance(passes, jax.core.Tracer)
        if reason := s.refuse_passes(None if traced else int(passes)):
            raise RecipeError(reason)
        if not traced:
            return x, call.replace(passes=int(passes))
        return (x if s.shared == "all" else jnp.where(passes > s.recursions, jnp.nan, x)), call

    def empty(self, rows: int, slots: int) -> State:
        out = {"core": kept.empty(self.settings.policy, self.settings, self.core.empty, rows, slots)}
        for name, end in (("prelude", self.prelude), ("coda", self.coda)):
            if end is not None:
                out[name] = end.empty(rows, slots)
        return out

    def update(self, load: jax.Array | None) -> None:
        self.depth.update(load)

    def refuse_cache(self) -> str:
        if self.settings.order == "sequence" and self.settings.recursions > 1:
            return "generation with a cache needs the core to repeat as a whole: order=cycle"
        return ""

    def rules_differ(self) -> bool:
        return self.settings.depth.rules_differ()

    def _in_place(self, x: jax.Array, where: Where, call: Call) -> jax.Array:
        """Each layer of the core runs `recursions` times before the next one does."""
        s, own = self.settings, self.core.blocks[0]
        graphdef = nnx.graphdef(own)
        (state,) = self.core.ready()
        inner = call.replace(keep=s.keys_values == "shared")

        def moved(variable: nnx.Variable) -> nnx.Variable:
            return variable.replace(jnp.swapaxes(variable[...], 0, 1)) if passes_of(variable) else variable

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            kept = None
            for r in range(inner.at_most(s.recursions)):
                at = lambda v, r=r: v.replace(v[...][r]) if passes_of(v) else v  # noqa: E731
                params = jax.tree.map(at, layer, is_leaf=is_variable)
                here = inner if kept is None else inner.replace(writes=False)
                x, after, _, _ = nnx.merge(graphdef, params)(x, where, here, kept)
                kept = after if s.keys_values == "shared" else None
            return x, None

        states = jax.tree.map(moved, state, is_leaf=is_variable)
        return jax.lax.scan(recomputed(body, self.making.remat), x, states, unroll=self.making.unroll or 1)[0]


class _Core:
    """The shared block with the policy of its keys and values (MoR paper, section 2.3); see `Core`."""

    def __init__(self, body: Recursive, whole: Where, first: int, *, cached: bool):
        """whole: all positions of the rows; first: number of the core's first layer; cached: whether states are those
        of generation."""
        s = body.settings
        self._stack, self._whole, self._cached = body.core, whole, cached
        self._keys_values, self._policy = s.keys_values, s.policy
        self._first, self._layers, self._passes = first, s.core.layers, s.recursions
        # A block that is used several times is gathered once, ahead of all its uses.
        self._states = body.core.ready() if s.recursions > 1 else body.core.states()

    def __call__(
        self, r: Any, x: jax.Array, where: Where, call: Call, carried: Carried
    ) -> tuple[jax.Array, Carried, Tales]:
        call = call.replace(layer=self._first + r * self._layers, previous=carried.previous)
        states = self._stack.at_pass(self._states, r) if self._passes > 1 else self._states
        if self._cached:
            return self._generated(r, states, x, where, call, carried)
        state, keep = None, call.keep
        if self._keys_values != "per_recursion":
            state, keep = (None, True) if r == 0 else (carried.state, False)
            call = call.replace(keep=call.keep or r == 0, writes=r == 0 or self._keys_values == "hybrid")
        x, after, told, previous = self._stack.through(states, x, where, call, state)
        return x, Carried(after if keep else carried.state, previous), told

    def _generated(
        self, r: Any, states: Any, x: jax.Array, where: Where, call: Call, carried: Carried
    ) -> tuple[jax.Array, Carried, Tales]:
        """The pass over positions that follow what the states hold."""
        keeps = not (self._policy.first_alone and r != 0)
        call = call.replace(writes=keeps)

        def through(x: Any, where: Where, own: Any) -> tuple[Any, Any, Tales]:
            (x, previous), here = x, call.replace(previous=x[1])
            if not isinstance(own, kept.Slots):
                x, after, told, previous = self._stack.through(states, x, where, here, own)
                return (x, previous), after, told
            filling = kept.Filling.of(own, where)
            x, after, told, previous = self._stack.through(states, x, filling.where, here, own.state)
            x, after = filling.done(x, own, after)
            return (x, previous), after, told

        caches, cache = self._policy.caches(self._passes), self._policy.cache(r)
        state = carried.state
        if self._keys_values == "hybrid" and r != 0:  # also where no position takes the pass
            renewed = jax.tree.map(
                self._renewed, kept.at(state, 0, caches), kept.at(state, cache, caches), is_leaf=_is_keys_values
            )
            state = kept.put(state, cache, renewed)
        needed = where.scattered and not (isinstance(r, int) and r == 0)
        # Rows that are picked out move anyway, and patterns of several blocks would be written out.
        in_place = len(self._stack.blocks) == 1 and not (needed and call.rows)
        (x, previous), state, told = where_needed(
            through,
            (x, self._stack.first_previous(x, call)),
            where,
            state,
            lambda state: kept.at(state, cache, caches, where_it_stands=in_place),
            lambda state, own: kept.put(state, cache, own) if keeps else state,
            rows=call.rows if needed else 0,
            skips=needed,
        )
        # Of groups of rows no more is known.
        return x, Carried(state, previous), by_token(told) if call.rows else told

    def _renewed(self, first: KeyValues, own: KeyValues) -> KeyValues:
        """A pass's keys and values, those of the new positions replaced by the first pass's."""

        def one(first: KeyValues, own: KeyValues) -> KeyValues:
            return written(own, taken(first, self._whole.index), self._whole)

        return jax.vmap(one)(first, own)


def _only(told: Any) -> Tales:
    return told[0] if told else {}


def _is_keys_values(node: Any) -> bool:
    return isinstance(node, KeyValues)
