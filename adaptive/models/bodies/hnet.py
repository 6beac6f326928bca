"""Hierarchical networks: positions are chunked where a router says, and the network inside sees chunks alone.

H-Net paper (arXiv 2507.07955), sections 2.1 to 2.3; released code, models/hnet.py and modules/dc.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers import stack as stacks
from adaptive.layers.block import Settings as Block
from adaptive.layers.call import Call, Tales, below
from adaptive.layers.chunkers import Chunker, Heard, dynamic
from adaptive.layers.cost import CAPACITIES, Cost, Span, Taken
from adaptive.layers.linear import use
from adaptive.layers.mixers import mamba2
from adaptive.layers.site import Site, param, scale_rates
from adaptive.layers.stack import Making, Stack
from adaptive.layers.state import State, repeated
from adaptive.layers.where import Where
from adaptive.models.bodies import Body, BodyModule, Through, plain
from adaptive.models.bodies.plain import scaled
from adaptive.models.chunks import after_chunks, in_groups, packed, shifted
from adaptive.parallel.context.chunks import filled, moving_average, running_sum
from adaptive.parallel.rows import gather, of_whole_rows
from adaptive.parallel.rules import batch_shards, constrain, even
from adaptive.routing.boundaries import (
    Boundaries,
    behind,
    chunk_statistics,
    dechunk,
    merged,
    select_boundaries,
    straight_through,
)
from adaptive.routing.chunks import begins
from adaptive.routing.stages import outwards
from adaptive.routing.types import AuxLosses, Selection, StageTrace, Trace
from adaptive.settings import ranged

MULTIPLES = 8, 128  # the least and the largest that capacities are rounded up to
FINENESS = 16  # rounding adds at most a slot in so many
_MAMBA = stacks.Settings((Block(mamba2.Settings(), None),), repeats=2, stream="float32", scale_residual=True)


@dataclasses.dataclass(frozen=True)
class Settings(Body):
    """One chunking stage around any body, which may be another one.

    merge           what a chunk's vector is: that of its boundary position, or the sum over the positions since the
                    boundary before it (ConceptMoE)
    capacities      share of the positions that can be chunks in training; () is all. With `capacity_steps`, one more
                    for every step named there, from which on it holds
    packing         capacity of each row, or of all rows of a device together
    rate            multiple of the learning rate of the stage: encoder, chunker, residual projection, decoder;
                    inner_rate: of all inside, a factor of what stages inside have of their own
    """

    encoder: stacks.Settings = _MAMBA
    chunker: Chunker = dynamic.Settings()
    inner: Body = plain.Settings()
    inner_width: int = ranged(0, least=0)  # width of the stream inside; 0: as outside
    decoder: stacks.Settings = _MAMBA
    merge: Literal["boundary", "sum"] = "boundary"
    capacities: tuple[float, ...] = ranged((), above=0, most=1)
    capacity_steps: tuple[int, ...] = ranged((), least=1)
    packing: Literal["row", "device"] = "row"
    rate: float = ranged(1.0, above=0)
    inner_rate: float = ranged(1.0, above=0)

    @property
    def layers(self) -> int:
        return self.encoder.layers + self.inner.layers + self.decoder.layers

    @property
    def stored_layers(self) -> int:
        return self.encoder.layers + self.inner.stored_layers + self.decoder.layers

    def title(self) -> str:
        return "H-Net"

    def slots(self, positions: int) -> tuple[tuple[int, int], ...]:
        """(first training step, slots for the chunks of so many positions) of every phase of the schedule."""
        return tuple((step, self.at_step(step).capacity(positions)) for step in (0, *self.capacity_steps))

    def stages(self) -> tuple[Body, ...]:
        return (self, *self.inner.stages())

    def width_inside(self, width: int) -> int:
        return self.inner_width or width

    def capacity(self, positions: int) -> int:
        """Slots for the chunks of so many positions, rounded up to a power of two's multiple as matmuls and attention
        like it, as far as that costs little; of a schedule the last ones."""
        fraction = self.capacities[-1] if self.capacities else 1.0
        least = max(1, int(fraction * positions))
        multiple = min(max(1 << (max(least // FINENESS, 1).bit_length() - 1), MULTIPLES[0]), MULTIPLES[1])
        return min(positions, -(-least // multiple) * multiple)

    def at_step(self, step: int) -> "Settings":
        own = self.capacities
        if self.capacity_steps:
            phase = sum(step >= at for at in self.capacity_steps)
            own = self.capacities[phase : phase + 1]
        return dataclasses.replace(self, capacities=own, capacity_steps=(), inner=self.inner.at_step(step))

    def changes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.capacity_steps, *self.inner.changes()}))

    def warmup_steps(self) -> int:
        return self.inner.warmup_steps()

    def check(self, width: int, at: str) -> None:
        self.encoder.check(width, f"{at}.encoder")
        self.decoder.check(width, f"{at}.decoder")
        self.chunker.check(f"{at}.chunker")
        if self.width_inside(width) < width:
            raise RecipeError(
                f"{at}.inner_width={self.inner_width}: narrower than the {width} around it; widths must not shrink "
                "inwards"
            )
        self._check_inside(f"{at}.inner.chunker")
        steps = self.capacity_steps
        if any(b <= a for a, b in zip((0, *steps), steps, strict=False)):
            raise RecipeError(f"{at}.capacity_steps={','.join(map(str, steps))}: must rise, from above 0")
        if (self.capacities or steps) and len(self.capacities) != len(steps) + 1:
            raise RecipeError(
                f"{at}.capacities has {len(self.capacities)} shares; the {len(steps) + 1} phases of "
                f"{at}.capacity_steps need one each (about 1.5 / {self.chunker.expected():g} = "
                f"{1.5 / self.chunker.expected():.2f} once trained; at the start routers keep 0.35 to 0.75)"
            )
        self.inner.check(self.width_inside(width), f"{at}.inner")

    def outer_rate(self) -> float:
        return self.rate

    def counts_documents(self) -> bool:
        return True

    def _check_inside(self, at: str) -> None:
        inside = self.inner
        if isinstance(inside, Settings) and inside.chunker.reads:
            raise RecipeError(
                f"{at}={inside.chunker.kind()}: it reads {inside.chunker.reads}, so it is for the outermost stage"
            )

    @property
    def passes(self) -> int:
        return self.inner.passes

    def widths(self, width: int) -> tuple[int, ...]:
        return (width, *self.inner.widths(self.width_inside(width)))

    def parameters(self, width: int) -> int:
        """Those of the stage are its encoder, decoder, chunker, residual projection and the vector that widens its
        chunks."""
        inside = self.width_inside(width)
        stacks = sum(part.parameters(width) + part.norm_size(width) for part in (self.encoder, self.decoder))
        own = self.chunker.parameters(width) + width**2 + width + (inside - width)
        return stacks + own + self.inner.parameters(inside)

    def unrolled_parameters(self, width: int) -> int:
        inside = self.width_inside(width)
        return self.parameters(width) - self.inner.parameters(inside) + self.inner.unrolled_parameters(inside)

    def router_parameters(self, width: int) -> int:
        return self.chunker.parameters(width) + self.inner.router_parameters(self.width_inside(width))

    def chunk_counts(self, positions: int) -> tuple[int, ...]:
        chunks = self.capacity(positions)
        return (chunks, *self.inner.chunk_counts(chunks))

    def pass_counts(self, positions: int) -> tuple[int, ...]:
        return self.inner.pass_counts(self.capacity(positions))

    def cost(self, width: int, positions: float, taken: Taken = CAPACITIES, stage: int = 0) -> tuple[Cost, ...]:
        """The network inside computes as many positions as the capacity has slots, whether chunks fill them or not; of
        rows that share them (packing=device) attention from row to row, which is masked, is not counted."""
        chunks: float = self.capacity(int(positions)) if taken.chunks is None else taken.chunks[0]
        inside = Taken(None if taken.chunks is None else taken.chunks[1:], taken.passes)

        def part(own: stacks.Settings, name: str, first: int) -> Cost:
            cost = own.cost(width, Span.whole(positions), first=first, depth=self.layers)
            return dataclasses.replace(cost, name=f"{name} {stage}")

        square = 2.0 * positions * width**2  # the residual projection
        chunking = Cost(f"chunking {stage}", tokens=positions, projections=square, last=square)
        return (
            part(self.encoder, "encoder", 0),
            chunking + self.chunker.cost(width, positions),
            *self.inner.cost(self.width_inside(width), chunks, inside, stage + 1),
            part(self.decoder, "decoder", self.encoder.layers),
        )

    def build(
        self, site: Site, keys: Iterator[jax.Array], making: Making, *, stage: int = 0, additions: int = 0
    ) -> "HNet":
        return HNet(self, site, keys, making, stage, additions)


class Residual(nnx.Module):
    """The encoder's output on its way around the inner network, in float32. Its weight begins at zero, its bias where
    PyTorch begins a linear layer's, as in the release."""

    def __init__(self, width: int, key: jax.Array):
        self.weight = param(jnp.zeros((width, width)), ("width", None), role="matrix")
        bound = width**-0.5
        self.bias = param(jax.random.uniform(key, (width,), jnp.float32, -bound, bound), (None,), role="bias")

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., width] -> f32 of the same shape."""
        return h.astype(jnp.float32) @ use(self.weight, jnp.float32) + self.bias[...]


class HNet(BodyModule):
    """Encoder, chunker, the network inside, and decoder; `pad` widens what enters the network inside.

    With a state, rows may have any lengths and their chunks begin at different times, without a limit on chunks. Layers
    compute in the making's dtype, but chunkers, residual paths and moving averages are float32.
    """

    def __init__(
        self, settings: Settings, site: Site, keys: Iterator[jax.Array], making: Making, stage: int, additions: int
    ):
        s = self.settings = settings
        self.stage, self.making = stage, making
        encoder, decoder, chunker, bias = jax.random.split(next(keys), 4)
        additions += s.encoder.additions + s.decoder.additions

        def part(own: stacks.Settings, first: int, key: jax.Array) -> Stack:
            place = scaled(site._replace(depth=s.layers), own, additions)
            return Stack(own, place, list(jax.random.split(key, len(own.blocks))), making, first=first, norm=True)

        self.encoder = part(s.encoder, 0, encoder)
        self.decoder = part(s.decoder, s.encoder.layers, decoder)
        self.chunker = s.chunker.build(site.width, site.std, chunker)
        self.residual = Residual(site.width, bias)
        scale_rates(self, s.rate)
        more = s.width_inside(site.width) - site.width
        # The vector that widens what enters the network inside; zero at first (H-Net paper, section 2.3).
        self.pad = param(jnp.zeros(more), (None,), role="vector") if more else None
        inside = site._replace(width=site.width + more)
        if not isinstance(s.inner, Settings):
            keys = iter(jax.random.split(next(keys), 64))
        self.inner: BodyModule = s.inner.build(inside, keys, making, stage=stage + 1, additions=additions)
        scale_rates(self.inner, s.inner_rate)
        if self.pad is not None:
            self.pad.set_metadata(rate=s.inner_rate * (s.inner.rate if isinstance(s.inner, Settings) else 1.0))

    def __call__(self, x: jax.Array, where: Where, call: Call, state: State | None = None) -> Through:
        where = where.replace(exists=where.present())
        h, encoder, told, _ = self.encoder(x, where, self._noise(call, 1), None if state is None else state["encoder"])
        tales: Tales = below("encoder", told)
        around = self.residual(h)
        z, value, through, record, chunks = self._chunked(h, where, call, state)
        if call.replay is not None:
            call = call.replace(replay=call.replay.behind(self.settings.encoder.layers))
        y, decoder, told, _ = self.decoder(
            (z + around).astype(self.making.dtype),
            where,
            self._noise(call, 2),
            None if state is None else state["decoder"],
        )
        tales |= below("inner", through.trace.told) | below("decoder", told)
        aux, trace = self._assembled(record, through, where)
        after = None
        if state is not None:
            own = {"encoder": encoder, "decoder": decoder, "inner": through.state}
            after = own | self._advanced(state, where, call, h, value, record[1], chunks)
        return Through(y, after, aux, trace._replace(told=tales))

    def empty(self, rows: int, slots: int) -> State:
        width = self.residual.bias.shape[0]
        zeros = jnp.zeros(rows, jnp.int32)
        own = {
            "seen": zeros,  # i32[rows]: positions so far
            "chunks": zeros,  # i32[rows]: chunks so far
            "last": jnp.zeros((rows, width), self.making.dtype),  # the encoder's output at the last position
            "token": zeros,  # the last byte; of the outermost stage alone
            "value": jnp.zeros((rows, width), jnp.float32),  # the moving average in the last chunk
            "behind": jnp.zeros((rows, width), jnp.float32),  # sum of encoder outputs behind the last boundary
        }
        inside = {name: part.empty(rows, slots) for name, part in self._parts()}
        return repeated(own, 1) | inside

    def update(self, load: jax.Array | None) -> None:
        self.inner.update(load)

    def refuse_cache(self) -> str:
        return self.inner.refuse_cache()

    def rules_differ(self) -> bool:
        return self.inner.rules_differ() or bool(self.settings.capacities)

    # Parts

    def _parts(self) -> tuple[tuple[str, Any], ...]:
        return ("encoder", self.encoder), ("decoder", self.decoder), ("inner", self.inner)

    def _noise(self, call: Call, part: int) -> Call:
        """The call as encoder or decoder has it: noise of its own, and nothing that the batch gave."""
        key = None if call.key is None else jax.random.fold_in(call.key, 2**20 + 4 * self.stage + part)
        return call.replace(key=key, given={}, previous=None, layer=0)

    def _chunked(
        self, h: jax.Array, where: Where, call: Call, state: State | None
    ) -> tuple[jax.Array, jax.Array, Through, tuple[Boundaries, jax.Array, jax.Array, Selection], jax.Array]:
        """The encoder's output h [rows, n, width] -> what the decoder reads of the chunks, f32 of the same shape; that
        before the straight-through estimator; the network inside; boundaries, where chunks begin, positions that exist
        and the selection; and how many chunks i32[rows] there are."""
        s, shape = self.settings, h.shape
        found = self.chunker(self._heard(h, where, call, state))
        exists = jnp.ones(shape[:2], bool) if where.exists is None else where.exists
        replay, segments = call.replay, where.segments
        wanted = found.wanted if replay is None else replay.chunks[0]
        found = found._replace(wanted=wanted & exists)
        if s.packing == "device" and state is None:
            if call.experts_per_token is not None:
                raise RecipeError("packing=device joins rows, which have no experts_per_token each: set packing=row")
            found, exists, segments, h = packed(found, exists, segments, h)
            replay = None if replay is None else replay.joined(exists.shape)
        n = h.shape[1]
        capacity = s.capacity(n) if call.limited else n
        selection, mask = of_whole_rows(lambda own: select_boundaries(own, capacity, min(n, even(capacity))), found)
        if s.merge == "boundary":
            chunks = gather(h, selection.indices)
        else:
            before = None if state is None else state["behind"][0]
            chunks = merged(h, selection, segments, before, total=running_sum, at=gather)
        chunks = constrain(chunks, "batch", "seq", None)
        inside = after_chunks(selection, segments, None if state is None else state["chunks"][0])
        call = call if replay is None else call.replace(replay=replay.inside(selection))
        through = self._inside(chunks, inside, call, None if state is None else state["inner"])
        z = dechunk(
            through.hidden[..., : shape[-1]],
            selection,
            mask,
            smooth=s.chunker.learned,
            segments=segments,
            initial=None if state is None else state["value"][0],
            average=moving_average,
            fill=filled,
        )
        confidence = jnp.where(mask, found.prob, 1 - found.prob)
        y = z * straight_through(confidence)[..., None] if s.chunker.learned else z
        count = selection.valid.sum(1, dtype=jnp.int32)
        return y.reshape(shape), z.reshape(shape), through, (found, mask, exists, selection), count

    def _inside(self, x: jax.Array, where: Where, call: Call, state: State | None) -> Through:
        """The network inside on chunks; of single positions the rows without a chunk may be left out."""
        if self.pad is not None:
            more = jnp.broadcast_to(self.pad[...].astype(x.dtype), (*x.shape[:2], self.pad.shape[0]))
            x = jnp.concatenate([x, more], axis=-1)
        call = call.replace(given={}, previous=None)
        if state is None or not call.rows or x.shape[1] > 1:
            return self.inner(x, where, call, state)

        def apply(x: jax.Array, where: Where, state: State) -> Any:
            out = self.inner(x, where, call, state)
            return out.hidden, out.state, (out.trace.depth, out.trace.stages)

        y, after, (depth, stages) = in_groups(apply, x, where, state, call.rows)
        return Through(y, after, AuxLosses(), Trace(depth, stages=stages))

    def _heard(self, h: jax.Array, where: Where, call: Call, state: State | None) -> Heard:
        first = jnp.arange(h.shape[1]) == 0
        if state is not None:
            first = first & (state["seen"][0][:, None] == 0)
        elif where.segments is None:
            first = jnp.broadcast_to(first, h.shape[:2])
        else:
            first = begins(where.segments)
        tokens = call.given.get("tokens")
        key = call.key if call.training else None
        return Heard(
            hidden=h,
            before=shifted(h, None if state is None else state["last"][0]),
            first=first,
            number=where.number,
            tokens=tokens,
            earlier=None if tokens is None else shifted(tokens, None if state is None else state["token"][0]),
            given=call.given.get("boundaries"),
            key=None if key is None else jax.random.fold_in(key, self.stage),
        )

    def _advanced(
        self, state: State, where: Where, call: Call, h: jax.Array, value: jax.Array, mask: jax.Array, chunks: jax.Array
    ) -> dict[str, jax.Array]:
        """This stage's own state after positions with encoder outputs h and averages value [rows, n, width], of which
        mask bool[rows, n] says where chunks begin."""
        count, tokens = where.counts(), call.given.get("tokens")

        def latest(new: jax.Array, old: jax.Array) -> jax.Array:
            """At each row's last position that exists; the old where none does."""
            last = jax.vmap(lambda row, i: row[jnp.maximum(i - 1, 0)])(new, count)
            return jnp.where((count > 0).reshape(-1, *(1,) * (old.ndim - 1)), last, old)

        before = {name: state[name][0] for name in ("seen", "chunks", "last", "token", "value", "behind")}
        own = {
            "seen": before["seen"] + count,
            "chunks": before["chunks"] + chunks,
            "last": latest(h, before["last"]),
            "token": before["token"] if tokens is None else latest(tokens, before["token"]),
            "value": latest(value, before["value"]),
            "behind": before["behind"]
            if self.settings.merge == "boundary"
            else behind(h, mask, where.exists, before["behind"]),
        }
        return repeated(own, 1)

    def _assembled(
        self, record: tuple[Boundaries, jax.Array, jax.Array, Selection], through: Through, where: Where
    ) -> tuple[AuxLosses, Trace]:
        """Losses and trace of this stage and all inside, told for its positions."""
        found, mask, exists, selection = record
        trace, shape = through.trace, where.shape
        aux, ratios = self.settings.chunker.losses(found, exists, self.stage, batch_shards())
        own = StageTrace(found.prob, mask, found.wanted & ~mask, exists, selection)
        stages = (own, *trace.stages)
        depth = outwards((own,), trace.depth, 0).reshape(shape)
        count = depth.size if where.exists is None else jnp.maximum(where.exists.sum(dtype=jnp.float32), 1)
        stats = chunk_statistics(found, mask, exists)
        scalars = (trace.scalars or {}) | {f"{name}_{self.stage}": value for name, value in stats.items()} | ratios
        scalars["chunks_per_byte"] = stages[-1].boundary_mask.sum(dtype=jnp.float32) / count
        if "mean_depth" in scalars:  # passes per position, where the network inside counts by chunk
            scalars["mean_depth"] = depth.sum(dtype=jnp.float32) / count
        scores = tuple(outwards((own,), a, jnp.nan).reshape(shape) for a in trace.scores)
        return AuxLosses({**through.aux, **aux}), trace._replace(
            depth=depth, scores=scores, scalars=scalars, stages=stages
        )
