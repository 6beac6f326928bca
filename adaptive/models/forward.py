"""One forward pass over a model's layers: scans over stacks of them, and what routed ones decided on the way."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.attention import KeyValues, Memory, Rows
from adaptive.layers.decoder import DecoderLayer
from adaptive.layers.moe.base import Context, RoutedLayer, Routing
from adaptive.layers.remat import Remat, recomputed
from adaptive.layers.site import Buffer
from adaptive.models.config import TransformerConfig
from adaptive.parallel.rules import gathered
from adaptive.routing.types import Aux, AuxLosses, ExpertCalls

ROUTED = ("first", "block", "last")  # parts of a model whose layers may be routed, in the order they run


class Forward:
    """Applies layers, and collects what their routed feed-forwards decided (`experts`)."""

    def __init__(self, config: TransformerConfig, context: Context, dtype: Any, remat: Remat, unroll: bool):
        self._config, self._context, self._dtype = config, context, dtype
        self._remat: Remat = remat
        self._unroll = unroll or 1
        self._calls: dict[str, list[ExpertCalls]] = {}
        self._previous: jax.Array | None = None  # router logits of the layer below
        self._layers_run = 0

    def one(
        self, part: str, layer: DecoderLayer, x: jax.Array, rows: Rows, memory: Memory | None = None
    ) -> tuple[jax.Array, KeyValues]:
        """One layer that is not stacked: (its output, the keys and values it attended to)."""
        graphdef, state = nnx.split(layer)
        context = self._context_of(self._layers_run, self._start(layer, x))
        self._layers_run += 1

        def apply(state, x, memory):
            x, kv, routing = nnx.merge(graphdef, state)(x, rows, memory, context)
            return x, kv, _logits(layer, routing), None if routing is None else _calls(routing)

        x, kv, self._previous, calls = self._checkpointed(apply)(state, x, memory)
        if calls is not None:
            self._calls[part] = [calls]
        return x, kv

    def block(self, routed: DecoderLayer, dense: DecoderLayer | None) -> Callable[..., tuple[jax.Array, Any]]:
        """The block as a function of (recursion, x, rows, memory of all its layers, keep=...)."""
        stacks = {"block": routed} if dense is None else {"block": routed, "dense": dense}
        states = {part: self._ready(layer) for part, layer in stacks.items()}

        def apply(r, x, rows, memory, *, keep):
            kvs = []
            for part, here, there in segments(self._config):
                # Layers here.start.. of this stack are layers there.start.. of the block.
                layers = self._at(states[part], r)
                kv = None if memory is None else memory.kv
                if here != there or len(stacks) > 1:
                    layers = jax.tree.map(lambda a, here=here: a[here.start : here.stop], layers)
                    kv = jax.tree.map(lambda a, there=there: a[there.start : there.stop], kv)
                x, kept = self._scan(part, stacks[part], layers, x, rows, memory, kv, keep)
                kvs.append(kept)
            if not keep:
                return x, None
            return x, kvs[0] if len(kvs) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *kvs)

        return apply

    def repeated_in_place(self, block: DecoderLayer, x: jax.Array, rows: Rows) -> jax.Array:
        """Sequence sharing: each layer of the block runs `recursions` times before the next one does."""
        graphdef, c = nnx.graphdef(block), self._config

        def body(x, layer):
            first = None
            for r in range(c.recursions):
                own = layer if c.share_parameters else jax.tree.map(lambda a, r=r: a[r], layer)
                memory = None if first is None else Memory(first, rows)
                x, kv, _ = nnx.merge(graphdef, own)(x, rows, memory)
                if c.kv == "shared":
                    first = kv
            return x, None

        return jax.lax.scan(self._checkpointed(body), x, self._ready(block), unroll=self._unroll)[0]

    def experts(self) -> dict[str, ExpertCalls]:
        """What routed feed-forwards decided: by part, with the leading axes of its buffers (recursions, layers)."""
        merged: dict[str, ExpertCalls] = {}
        for part, calls in self._calls.items():
            if part != "block":
                merged[part] = calls[0]
                continue
            passes, segmented = self._config.recursions, len(calls) // self._config.recursions
            joined = [
                jax.tree.map(lambda *a: jnp.concatenate(a), *calls[r * segmented : (r + 1) * segmented])
                for r in range(passes)
            ]
            merged[part] = joined[0] if passes == 1 else _stacked(joined)
        return merged

    # Parts

    def _scan(
        self,
        part: str,
        layer: DecoderLayer,
        state: Any,
        x: jax.Array,
        rows: Rows,
        memory: Memory | None,
        kv: KeyValues | None,
        keep: bool,
    ) -> tuple[jax.Array, KeyValues | None]:
        graphdef = nnx.graphdef(layer)
        count = len(jax.tree.leaves(state)[0])
        numbers = self._layers_run + jnp.arange(count)
        self._layers_run += count

        def body(carry, scanned):
            x, previous = carry
            own, kv, number = scanned
            mine = None if memory is None else memory._replace(kv=kv)
            context = self._context_of(number, previous)
            x, out, routing = nnx.merge(graphdef, own)(x, rows, mine, context)
            carry = x, _logits(layer, routing)
            return carry, (out if keep else None, None if routing is None else _calls(routing))

        start = (x, self._start(layer, x))
        (x, self._previous), (kept, calls) = jax.lax.scan(
            self._checkpointed(body), start, (state, kv, numbers), unroll=self._unroll
        )
        if calls is not None:
            self._calls.setdefault(part, []).append(calls)
        return x, kept

    def _context_of(self, number: Any, previous: jax.Array | None) -> Context:
        key = self._context.key
        return self._context._replace(
            previous=previous, key=None if key is None else jax.random.fold_in(key, number)
        )  # fmt: skip

    def _start(self, layer: DecoderLayer, x: jax.Array) -> jax.Array | None:
        """Logits that a router reads from below: zeros at the first layer and where the tokens are other ones."""
        routed = layer.feed_forward
        if not (isinstance(routed, RoutedLayer) and routed.reads_previous):
            return None
        previous = self._previous
        if previous is not None and previous.shape[:2] == x.shape[:2]:
            return previous
        return jnp.zeros((*x.shape[:2], routed.choices), jnp.float32)

    def _ready(self, layer: DecoderLayer) -> Any:
        """A stack's parameters. A block used several times is gathered once, ahead of all its uses."""
        state = nnx.state(layer)
        if self._config.recursions == 1:
            return state

        def ready(param: nnx.Variable) -> nnx.Variable:
            axes = param.get_metadata().get("axes", ())
            return param.replace(gathered(param[...], axes, self._dtype)) if "width" in axes else param

        return jax.tree.map(ready, state, is_leaf=_is_variable)

    def _at(self, state: Any, r: int) -> Any:
        """A stack's state at recursion r: parameters where each recursion has its own, buffers where it is shared."""
        c = self._config
        if c.recursions == 1:
            return state
        if not c.share_parameters:
            return jax.tree.map(lambda a: a[r], state)
        own = lambda v: v.replace(v[...][r]) if isinstance(v, Buffer) else v  # noqa: E731
        return jax.tree.map(own, state, is_leaf=_is_variable)

    def _checkpointed(self, fn):
        return recomputed(fn, self._remat)


def segments(config: TransformerConfig) -> list[tuple[str, range, range]]:
    """The block in the order its layers run: (stack, layers of the stack, layers of the block) of each stretch."""
    dense = config.moe.dense_layers if config.moe.router != "none" else ()
    counts = {"block": 0, "dense": 0}
    out: list[tuple[str, range, range]] = []
    for i in range(config.block_size):
        part = "dense" if i in dense else "block"
        if out and out[-1][0] == part:
            part, here, there = out.pop()
            out.append((part, range(here.start, here.stop + 1), range(there.start, i + 1)))
        else:
            out.append((part, range(counts[part], counts[part] + 1), range(i, i + 1)))
        counts[part] += 1
    return out


def expert_losses(experts: dict[str, ExpertCalls], layer: RoutedLayer) -> AuxLosses:
    """Each auxiliary loss of the routed feed-forwards, averaged over all their calls, and those of all calls together.

    layer  any of them: it knows the coefficients and how joint losses are formed
    """
    if not experts:
        return AuxLosses()
    calls = list(experts.values())

    def joined(of: Callable[[ExpertCalls], dict[str, jax.Array]]) -> dict[str, jax.Array]:
        # Leading axes (recursions, layers) are those of a scalar.
        flat = [jax.tree.map(lambda a, n=c.stats["calls"].ndim: a.reshape(-1, *a.shape[n:]), of(c)) for c in calls]
        return jax.tree.map(lambda *a: jnp.concatenate(a), *flat)

    losses = {name: value.mean() for name, value in joined(lambda c: c.losses).items()}
    losses |= layer.joint_losses(joined(lambda c: c.parts))
    coefficients = layer.coefficients()
    return AuxLosses({name: Aux(value, coefficients[name]) for name, value in losses.items()})


def _calls(routing: Routing) -> ExpertCalls:
    return ExpertCalls(routing.losses, routing.stats, routing.parts, routing.dispatch.per_token())


def _logits(layer: DecoderLayer, routing: Routing | None) -> jax.Array | None:
    routed = layer.feed_forward
    reads = isinstance(routed, RoutedLayer) and routed.reads_previous
    return routing.logits if reads and routing is not None else None


def _stacked(calls: list[ExpertCalls]) -> ExpertCalls:
    """Recursions stacked; they compute different numbers of tokens, so the counts per token are padded with zeros."""
    most = max(c.per_token.shape[-1] for c in calls)
    widen = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, most - a.shape[-1])])  # noqa: E731
    return jax.tree.map(lambda *a: jnp.stack(a), *(c._replace(per_token=widen(c.per_token)) for c in calls))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
