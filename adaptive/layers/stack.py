"""A pattern of blocks, repeated, as one scan."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers import block, staged
from adaptive.layers.block import Block
from adaptive.layers.call import Call, Tales
from adaptive.layers.cost import Cost, Span
from adaptive.layers.norm import make_norm, norm_size
from adaptive.layers.remat import Remat, recomputed
from adaptive.layers.site import Site, is_variable, name_layers, passes_of
from adaptive.layers.state import State, Within, repeated
from adaptive.layers.where import Where
from adaptive.parallel.rules import axis_size, gathered
from adaptive.settings import divisors, ranged

Shared = Literal["all", "mixers", "none"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`blocks` one after another, and all of that `repeats` times."""

    blocks: tuple[block.Settings, ...] = (block.Settings(),)
    repeats: int = ranged(1, least=1, most=10_000)
    stream: Literal["compute", "float32"] = "compute"  # dtype of the residual stream; compute: as layers compute
    scale_residual: bool = False  # initial matrices that write to the stream shrink with the root of its additions

    @property
    def pattern(self) -> int:
        """Layers of the pattern."""
        return sum(b.repeat for b in self.blocks)

    @property
    def layers(self) -> int:
        return self.repeats * self.pattern

    @property
    def additions(self) -> int:
        """How often the stack adds to the residual stream."""
        return self.repeats * sum(b.additions for b in self.blocks)

    def numbers(self, of: int, first: int = 0) -> tuple[int, ...]:
        """Numbers of the layers that block `of` of the pattern stands for, counted from `first`, in the order they
        run."""
        before = sum(b.repeat for b in self.blocks[:of])
        return tuple(
            first + i * self.pattern + before + j for i in range(self.repeats) for j in range(self.blocks[of].repeat)
        )

    def refuse_stages(self, stages: int, groups: int) -> str:
        """Why the layers cannot be split into so many parts, and which numbers can be; empty where they can."""
        if self.units % (stages * groups) == 0:
            return ""
        unit = ("layer" if len(self.blocks) == 1 else "repeat") + "s" * (self.units > 1)
        what = unit if len(self.blocks) == 1 else f"{unit} of its pattern of {self.pattern} layers"
        fits = [d // groups for d in divisors(self.units) if d % groups == 0]
        given = f"mesh.stage={stages}" + (f" with mesh.stage_groups={groups}" if groups > 1 else "")
        which = f"it can be {', '.join(map(str, fits))}" if fits else "no number of stages does"
        return f"{given} does not divide the {self.units} {what} that stages share; {which}"

    @property
    def units(self) -> int:
        """What can be split over stages: layers of one kind, or repeats of the pattern."""
        return self.layers if len(self.blocks) == 1 else self.repeats

    def check(self, width: int, at: str) -> None:
        if not self.blocks:
            raise RecipeError(f"{at}.blocks is empty: a stack needs a block")
        for i, one in enumerate(self.blocks):
            one.check(width, f"{at}.blocks.{i}")

    def norm_size(self, width: int) -> int:
        """Parameters of the norm behind the stack."""
        return norm_size(self.blocks[-1].norm, width)

    def parameters(self, width: int, passes: int = 1, shared: Shared = "all") -> int:
        """Parameters of the blocks, without a norm behind them; `passes` of a recursion, and what they share."""
        mixers, feeds = (passes if shared == "none" else 1), (passes if shared != "all" else 1)
        sizes = [(b.repeat, b.sizes(width)) for b in self.blocks]
        return self.repeats * sum(n * (mixers * mixer + feeds * feed) for n, (mixer, feed) in sizes)

    def cost(self, width: int, span: Span, *, first: int = 0, depth: int = 0) -> Cost:
        """FLOPs of the stack once; first: number of its first layer in the unrolled network, which has `depth` layers
        (0: these alone)."""
        total = Cost(tokens=span.queries)
        for i, one in enumerate(self.blocks):
            numbers = self.numbers(i, first)
            site = Site(width, layers=numbers, depth=depth or self.layers)
            total += one.cost(span, site) * len(numbers)
        return total


class Making(NamedTuple):
    """How modules are made and computed, whatever they are.

    dtype   what layers compute in; remat, unroll: of the scan over layers
    """

    dtype: Any
    remat: Remat = "none"
    unroll: bool = False


class Stack(nnx.Module):
    """The blocks of a stack and, with `norm`, a normalisation behind them.

    Call it, or `run` it with states that `ready` or `at_pass` gave, as a recursion does.
    """

    def __init__(
        self,
        settings: Settings,
        site: Site,
        keys: list[jax.Array],
        making: Making,
        *,
        first: int = 0,
        passes: int = 1,
        shared: Shared = "all",
        norm: bool = False,
        in_stages: bool = False,
    ):
        """keys: one per block of the pattern; first: number of the first layer in the unrolled network, of which
        site.depth is the depth; passes: of a recursion that runs the stack, and what they share; norm: whether one
        follows; in_stages: whether a pipeline can split its layers."""
        self.settings, self.making, self.in_stages = settings, making, in_stages
        blocks = []
        for i, (one, key) in enumerate(zip(settings.blocks, keys, strict=True)):
            numbers = settings.numbers(i, first)
            here = site._replace(stack=(len(numbers),), layers=numbers, stride=settings.layers)
            together = here._replace(uses=passes if passes > 1 else 0)
            apart = here._replace(stack=(passes, len(numbers)))
            mixer = apart if shared == "none" and passes > 1 else together
            feed_forward = apart if shared != "all" and passes > 1 else together
            blocks.append(Block(one, mixer, feed_forward, key, making.dtype))
        self.blocks = nnx.List(blocks)
        if in_stages:
            name_layers(self.blocks, "stages")
        self.norm = make_norm(settings.blocks[-1].norm, site.width, site.norm_eps) if norm else None

    def __call__(
        self, x: jax.Array, where: Where, call: Call, state: State | None = None
    ) -> tuple[jax.Array, State | None, Tales, jax.Array | None]:
        """x [rows, n, width] -> (the same shape in the compute dtype, state, what was done, the last router's logits).

        state   what the same rows left behind (`empty`); None: nothing. Returned if one was given or with `call.keep`.
                Of some rows of a larger state, and of layers anywhere in it: a `Within` for each block, whose layer is
                the first
        """
        x, state, told, previous = self.through(self.states(), x, where, call, state)
        if self.norm is not None:
            x = self.norm(x)
        return x.astype(self.making.dtype), state, told, previous

    def empty(self, rows: int, slots: int) -> State:
        """The state before the first position, with room for `slots` of each row: one entry per block, leaves
        [layers, rows, ...]; None of a block without a mixer."""

        def one(i: int, own: Block) -> State:
            if own.mixer is None:
                return None
            count = len(self.settings.numbers(i))
            return repeated(own.mixer.empty(rows, slots, self.making.dtype), count)

        return tuple(one(i, own) for i, own in enumerate(self.blocks))

    @property
    def stream(self) -> Any:
        """Dtype of the residual stream."""
        return jnp.float32 if self.settings.stream == "float32" else self.making.dtype

    def prepared(self, where: Where) -> Where:
        """`where` with the rotary tables that the blocks read, so that they are computed once."""
        kinds = [k for b in self.settings.blocks if b.mixer is not None for k in b.mixer.rotary()]
        return where.with_tables(*kinds) if kinds else where

    # Parameters as arguments

    def states(self) -> list[Any]:
        """Parameters and buffers of every block."""
        return [nnx.state(own) for own in self.blocks]

    def ready(self) -> list[Any]:
        """The same, gathered and in the compute dtype: for a stack that is used several times."""

        def ready(param: nnx.Variable) -> nnx.Variable:
            axes = param.get_metadata().get("axes") or ()
            return param.replace(gathered(param[...], axes, self.making.dtype)) if "width" in axes else param

        return [jax.tree.map(ready, state, is_leaf=is_variable) for state in self.states()]

    @staticmethod
    def at_pass(states: list[Any], r: Any) -> list[Any]:
        """States at pass `r`, a number or traced, of a recursion: of what passes have of their own, its part."""

        def at(variable: nnx.Variable) -> nnx.Variable:
            if not passes_of(variable):
                return variable
            value = variable[...]
            return variable.replace(
                value[r] if isinstance(r, int) else jax.lax.dynamic_index_in_dim(value, r, 0, False)
            )

        return [jax.tree.map(at, state, is_leaf=is_variable) for state in states]

    def through(
        self, states: list[Any], x: jax.Array, where: Where, call: Call, state: State | None
    ) -> tuple[jax.Array, State | None, Tales, jax.Array | None]:
        """As `run`, with states of all layers; where the layers are split over stages, these compute them."""
        stages = axis_size("stage") if self.in_stages and state is None and not call.keep else 1
        if stages == 1:
            return self.run(states, x, where, call, state)
        where, x = self.prepared(where), x.astype(self.stream)
        x, told, previous = staged.forward(self.run, states, stages, x, where, call, self.first_previous(x, call))
        return x, None, told, previous

    def run(
        self, states: list[Any], x: jax.Array, where: Where, call: Call, state: State | None
    ) -> tuple[jax.Array, State | None, Tales, jax.Array | None]:
        """The blocks with these states on the residual stream x, without the norm; result as of a call, in the stream's
        dtype. States may be those of whole repeats of the pattern, fewer than the stack has."""
        where = self.prepared(where)
        x = x.astype(self.stream)
        before = [None] * len(states) if state is None else list(state)
        start = (x, self.first_previous(x, call), call.layer)
        rounds = self._rounds(states)
        if rounds == 1:
            (x, previous, _), (kept, told) = self._pattern(start, states, before, where, call)
        elif any(isinstance(own, Within) for own in before):
            (x, previous, _), kept, told = self._rounds_in_place(rounds, start, states, before, where, call)
        else:
            fold = lambda a: a.reshape(rounds, -1, *a.shape[1:])  # noqa: E731
            unfold = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731

            def body(carry: Any, scanned: Any) -> Any:
                own, before = scanned
                return self._pattern(carry, own, before, where, call)

            scanned = jax.tree.map(fold, (states, before))
            (x, previous, _), outs = jax.lax.scan(body, start, scanned, unroll=self.making.unroll or 1)
            kept, told = jax.tree.map(unfold, outs)
        return x, tuple(kept) if call.keep or state is not None else None, told, previous

    def _rounds(self, states: list[Any]) -> int:
        """Rounds of the outer scan; none of a pattern of one block, whose layers are one scan."""
        return _layers_of(states[0]) // self.settings.blocks[0].repeat if len(self.blocks) > 1 else 1

    def _pattern(self, carry: Any, states: list[Any], before: list[Any], where: Where, call: Call) -> Any:
        """All blocks once: carry (stream, logits of the router below, number of the next layer)."""
        kept: list[Any] = []
        told: Tales = {}
        for i, own in enumerate(self.blocks):
            carry, (after, tales) = self._layers(own, _layers_of(states[i]), carry, states[i], before[i], where, call)
            kept.append(after)
            told |= {f"blocks/{i}/{path}": tale for path, tale in tales.items()}
        return carry, (kept, told)

    def _layers(self, own: Block, count: int, carry: Any, state: Any, before: Any, where: Where, call: Call) -> Any:
        """`count` layers of one block, whose states and results have a leading axis."""
        graphdef = nnx.graphdef(own)

        def layer(carry: Any, scanned: Any) -> Any:
            x, previous, number = carry
            params, before = scanned
            here = call.replace(previous=previous).at(number)
            x, after, told, logits = nnx.merge(graphdef, params)(x, where, here, before)
            return (x, logits if previous is not None else None, number + 1), (after, told)

        layer = recomputed(layer, self.making.remat)
        if isinstance(before, Within):
            return self._layers_in_place(layer, carry, state, before)
        if before is not None and count > 1:
            carry, (kept, told) = self._layers_in_place(layer, carry, state, Within(before, jnp.zeros((), jnp.int32)))
            return carry, (kept.whole, told)
        if count == 1:
            squeeze = lambda a: a[0]  # noqa: E731
            carry, outs = layer(carry, jax.tree.map(squeeze, (state, before)))
            return carry, jax.tree.map(lambda a: a[None], outs)
        return jax.lax.scan(layer, carry, (state, before), unroll=self.making.unroll or 1)

    def _layers_in_place(self, layer: Callable[..., Any], carry: Any, state: Any, before: Within) -> Any:
        """The same with states of earlier positions, which go through the layers as one and are written where they
        stand: copied in and out of each layer, caches cost more than all else of a step of generation."""

        def body(carry: Any, params: Any) -> Any:
            carry, whole, i = carry
            carry, (after, told) = layer(carry, (params, before._replace(whole=whole, layer=i)))
            return (carry, after.whole, i + 1), told

        start = carry, before.whole, before.layer
        (carry, after, _), told = jax.lax.scan(body, start, state, unroll=self.making.unroll or 1)
        return carry, (before._replace(whole=after), told)

    def _rounds_in_place(self, rounds: int, carry: Any, states: Any, before: Any, where: Where, call: Call) -> Any:
        """All rounds of the pattern with states that stand among others."""
        each = []
        for i in range(rounds):
            part = lambda a, i=i: a.reshape(rounds, -1, *a.shape[1:])[i]  # noqa: E731
            here = [
                None if own is None else own._replace(layer=own.layer + i * block.repeat)
                for own, block in zip(before, self.settings.blocks, strict=True)
            ]
            carry, (kept, told) = self._pattern(carry, jax.tree.map(part, states), here, where, call)
            each.append(told)
            before = [
                None if old is None else old._replace(whole=own.whole) for old, own in zip(before, kept, strict=True)
            ]
        return carry, before, jax.tree.map(lambda *a: jnp.concatenate(a), *each)

    def first_previous(self, x: jax.Array, call: Call) -> jax.Array | None:
        """Logits that the first router reads from below: zeros at the first layer and where positions are others."""
        choices = max(own.reads_previous for own in self.blocks)
        if not choices:
            return None
        if call.previous is not None and call.previous.shape[:2] == x.shape[:2]:
            return call.previous
        return jnp.zeros((*x.shape[:2], choices), jnp.float32)


def _layers_of(state: Any) -> int:
    """How many layers the state of a block is of."""
    return jax.tree.leaves(state)[0].shape[0]
