"""Continuous batching: requests come and go while the rows of one model are computed together.

A thread of its own runs the compiled programs and reads what they did one launch late, so that the device need not wait
for it. What a request is answered depends on itself alone: on its prompt, its rules of drawing and its seed.
"""

import collections
import time
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.inference.caching import refuse_fixed
from adaptive.inference.engine.costs import Costs
from adaptive.inference.engine.desk import Desk
from adaptive.inference.engine.passes import Picked
from adaptive.inference.engine.plan import Launch, Sizes, choose, expected, whole
from adaptive.inference.engine.prefixes import Prefixes
from adaptive.inference.engine.slots import LIKELIEST, Programs, Told, asked_of
from adaptive.inference.engine.speculation import Drafting, Speculating
from adaptive.inference.engine.tickets import Row, Ticket
from adaptive.inference.requests import Made, Reason, Request
from adaptive.inference.sampling import Marker, marker_of
from adaptive.models import steps
from adaptive.runs.load import Trained

SHORT = 16  # tokens of the shorter of the two programs that read prompts


class Engine(Desk[Row]):
    """Computes requests together (`requests.Engine`).

    rows    sequences that are computed at once
    length  tokens of a sequence at most, its prompt included
    queue   requests that may wait for a row
    piece   tokens of a prompt that are read at once, between two steps of the other rows
    prefixes  beginnings of prompts, in whole pieces, whose state is kept for prompts that begin alike
    quantum tokens after which a sequence gives its row to one that waits, and later begins by reading what it has; 0:
            it keeps it to its end
    vocab, marker  as of `sampling.Sampler`
    batch   rows that one launch computes at most, of models that can be computed so (`models.steps`): of a recursion
            rows before different passes, while others wait; 0: half of the rows. Without passes it is all
    drafting  a recursion's first passes draft tokens that all passes check together: for few rows, and memory that is
            slow beside arithmetic. The tokens are those without it
    stepwise  False: all rows and all passes together at every token, as other models are computed
    group   of other models: rows with a new chunk that the network inside an H-Net computes at once; 0: all rows at
            every token
    replay  as of `passes.Picked`
    """

    counted = ("prompt_tokens", "passes", "launches", "rows_launched", "rows_computed")

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        state: Any,
        *,
        rows: int = 8,
        length: int = 1024,
        queue: int = 256,
        piece: int = 64,
        prefixes: int = 0,
        quantum: int = 0,
        vocab: int | None = None,
        marker: Callable[[], Marker] | None = None,
        batch: int = 0,
        stepwise: bool = True,
        drafting: Drafting | None = None,
        group: int = 0,
        replay: np.ndarray | None = None,
    ):
        model = nnx.merge(graphdef, state)
        if reason := model.refuse_generation() or model.refuse_cache() or refuse_fixed(model.settings):
            raise RecipeError(reason)
        longest = model.settings.positions or length
        super().__init__(rows, min(length, longest), queue, model.settings.vocab_size if vocab is None else vocab)
        self._piece, self._marker = max(piece, SHORT), marker
        # Whatever is read, all of a piece needs room.
        more = max(self._piece, drafting.most + 1 if drafting else 0)
        room: dict[str, Any] = {"rows": rows, "room": self.length + more, "vocab": vocab}
        self._programs: Programs
        if drafting is not None:
            self._programs = Speculating(graphdef, state, drafting=drafting, **room)
        elif not stepwise or marker is not None or steps.refuse(model.settings) or steps.linked(model):
            self._programs = Programs(graphdef, state, group=group, **room)
        else:
            recursive = model.settings.body.passes > 1
            batch = min(rows, batch or max(1, rows // 2)) if recursive else rows
            self._programs = Picked(graphdef, state, batch=batch, replay=replay, **room)
        self._slots = self._programs.empty()
        self._store = self._programs.store(prefixes) if prefixes else None
        self._prefixes, self._quantum = Prefixes(prefixes, self._piece), quantum
        self._costs = Costs(model.settings)
        self._cache_bytes = sum(a.nbytes for a in jax.tree.leaves(self._slots.cache))
        self._markers: dict[Ticket, Marker] = {}
        self._unread: collections.deque[tuple[Launch, Told, list[Row | None]]] = collections.deque()
        self._told = (0, 0)  # rows before a pass and before a turn, behind the last launch that was read
        self._turned = True  # whether rows that generate have had a turn since a prompt was read
        self._settled = 0.0  # when a launch was last read
        self._start()

    @classmethod
    def of(cls, trained: Trained, **options: Any) -> Self:
        """The engine of a trained model; options of the constructor. Raises RecipeError where it cannot generate."""
        if trained.refuse_generation:
            raise RecipeError(f"{trained.recipe.name} cannot generate: {trained.refuse_generation}")
        stages = len(trained.recipe.model.facts().chunking)
        rows = options.get("rows", 8)
        options.setdefault("group", max(1, rows // 4) if stages else 0)
        options.setdefault("vocab", trained.tokenizer.vocab_size)
        options.setdefault("marker", marker_of(trained.recipe, trained.tokenizer))
        return cls(trained.graphdef, trained.state, **options)

    # Called by any thread

    def refuse(self, request: Request) -> str:
        if reason := super().refuse(request):
            return reason
        if not 0 <= request.likeliest <= LIKELIEST:
            return f"likeliest={request.likeliest}: 0 to {LIKELIEST} can be told"
        return ""

    def warm(self, *, likeliest: bool = True) -> None:
        """Compiles all programs, before the first request comes. likeliest: those too that tell likely tokens."""
        with self._changed:
            assert not self._waiting and not any(self._held)
            programs, nobody = self._programs, np.zeros(self.rows, bool)
            given = None if self._marker is None else nobody
            asked = asked_of(Request(np.zeros(1, np.int32), 1), 0)
            for count in programs.batches:
                self._slots, _ = programs.once(self._slots, nobody, count)
            for most in (0, LIKELIEST) if likeliest else (0,):
                for size in sorted({SHORT, self._piece}):
                    self._slots, _ = programs.read(
                        self._slots, 0, np.zeros(size, np.int32), np.arange(size) < 1, first=True, last=True,
                        asked=asked, given=None if given is None else np.zeros(size, bool), most=most,
                    )  # fmt: skip
                for count in programs.turns:
                    self._slots, _ = programs.turn(self._slots, nobody, given, count, most)
                for count in programs.tokens:
                    self._slots, _ = programs.token(self._slots, nobody, count, most)
            jax.block_until_ready(self._slots)

    def figures(self) -> dict[str, float]:
        size = self._cache_bytes
        return super().figures() | {
            "cache_bytes": size,
            "cache_bytes_per_token": size / (self.rows * self._programs.room),
        }

    # The engine's own thread

    def _round(self) -> None:
        self._admit()
        behind = 1 if self._launch() and self._marker is None else 0
        while len(self._unread) > behind:
            self._settle(*self._unread.popleft())

    def _busy(self) -> bool:
        return bool(self._unread) or super()._busy()

    def _admit(self) -> None:
        if self._quantum and self._waiting and None not in self._held:
            self._preempt()
        with self._changed:
            for r in range(self.rows):
                if self._held[r] is None and self._waiting:
                    ticket = self._waiting.popleft()
                    made = np.array(ticket.made, np.int32)
                    tokens = np.concatenate([np.asarray(ticket.request.prompt, np.int32), made])
                    self._held[r] = Row(ticket, tokens, since=len(made))

    def _preempt(self) -> None:
        """Takes the row of the sequence that has made most tokens in it, if these are as many as it may."""

        def spent(row: Row | None) -> int:
            return -1 if row is None or row.reading else len(row.ticket.made) - row.since

        if max(map(spent, self._held)) < self._quantum:
            return
        while self._unread:  # what it makes meanwhile is its own
            self._settle(*self._unread.popleft())
        with self._changed:
            r = max(range(self.rows), key=lambda r: spent(self._held[r]))
            row = self._held[r]
            if row is not None and spent(row) >= self._quantum:
                self._held[r] = None
                self._waiting.append(row.ticket)
                self._figures["preempted"] += 1

    def _launch(self) -> bool:
        """A piece of a prompt, or a pass or a turn of other rows; whether there was anything that need not wait."""
        reading = [row for row in self._held if row is not None and row.reading]
        others = sum(row is not None for row in self._held) - len(reading)
        first = self._turned or len(reading) > others
        chosen = None if reading and first else self._next()
        if chosen is None and reading:
            chosen = Launch("read", 1)
        if chosen is None:
            return False
        held = list(self._held)
        if chosen.kind == "read":
            row = min(reading, key=lambda row: row.ticket.number)
            told, held = self._read(row), [row if own is row else None for own in held]
        else:
            told = self._go_on(chosen)
        self._turned = chosen.kind in ("turn", "token") or (self._turned and chosen.kind == "pass")
        self._count(**{"launches": 1, f"{chosen.kind}_launches": 1})
        self._unread.append((chosen, told, held))
        return True

    def _next(self) -> Launch | None:
        programs, flying = self._programs, [launch for launch, *_ in self._unread]
        sizes, live = Sizes(programs.turns, programs.batches, programs.tokens), self._live()
        if not programs.passes:
            return whole(live, sizes)
        return choose(*expected(self._told, flying), live, sizes, flying)

    def _live(self) -> int:
        """Rows that want another token behind what flies, which draws one for each of them if it draws any."""
        drawn = [held for launch, _, held in self._unread if launch.kind != "pass"]
        count = 0
        for row in self._held:
            if row is not None and not row.reading:
                coming = sum(any(own is row for own in held) for held in drawn)
                count += len(row.ticket.made) + coming < row.ticket.request.tokens
        return count

    def _read(self, row: Row) -> Told:
        r = next(r for r, own in enumerate(self._held) if own is row)
        request = row.ticket.request
        if row.read == 0 and self._store is not None and (found := self._prefixes.find(row.tokens)):
            place, row.read = found
            self._slots = self._programs.fetch(self._slots, self._store, r, place)
            self._count(prefix_tokens=row.read)
            self._skipped(row)
        first = row.read == 0
        count = min(len(row.tokens) - row.read, self._piece)
        size = SHORT if count <= SHORT else self._piece
        tokens = np.zeros(size, np.int32)
        tokens[:count] = row.tokens[row.read : row.read + count]
        valid = np.arange(size) < count
        given = None
        if self._marker is not None:
            marker = self._marker() if first else self._markers[row.ticket]
            self._markers[row.ticket] = marker
            given = np.array([i < count and marker.push(int(token)) for i, token in enumerate(tokens)])
        row.read += count
        asked = asked_of(request, len(row.ticket.made))
        self._slots, told = self._programs.read(
            self._slots, r, tokens, valid, first=first, last=not row.reading, asked=asked, given=given,
            most=LIKELIEST if request.likeliest else 0,
        )  # fmt: skip
        self._count(prompt_tokens=count)
        if self._store is not None and (keep := self._prefixes.keep(row.tokens, row.read)) is not None:
            self._store = self._programs.put_away(self._store, self._slots, r, keep)
        return told

    def _skipped(self, row: Row) -> None:
        """Has the marker of a row hear tokens that need not be read."""
        if self._marker is not None:
            marker = self._markers[row.ticket] = self._marker()
            for token in row.tokens[: row.read]:
                marker.push(int(token))

    def _go_on(self, launch: Launch) -> Told:
        """A pass or a turn of rows that generate."""
        keep = np.array([row is not None and not row.reading for row in self._held])
        self._count(rows_launched=launch.rows)
        if launch.kind == "pass":
            self._slots, told = self._programs.once(self._slots, keep, launch.rows)
            return told
        asks = any(row is not None and row.ticket.request.likeliest for row in self._held)
        most = LIKELIEST if asks else 0
        if launch.kind == "token":
            self._slots, told = self._programs.token(self._slots, keep, launch.rows, most)
        else:
            self._slots, told = self._programs.turn(self._slots, keep, self._given(), launch.rows, most)
        return told

    def _given(self) -> np.ndarray | None:
        """bool[rows]: whether a chunk begins at the token of each row, for models that are told."""
        if self._marker is None:
            return None
        given = np.zeros(self.rows, bool)
        for r, row in enumerate(self._held):
            if row is not None and row.ticket.last is not None and not row.reading:
                given[r] = self._markers[row.ticket].push(row.ticket.last.token)
        return given

    def _settle(self, launch: Launch, told: Told, held: list[Row | None]) -> None:
        """Reads what a launch did, and hands out what it made for the rows as they were held then."""
        told, before = jax.device_get(told), self._figures["tokens"]
        self._told = tuple(told.waiting.tolist())
        if launch.kind != "read":
            self._count(rows_computed=int(told.valid.sum()))
        if told.drawn is None:
            return
        if told.valid.ndim == 1:
            told = jax.tree.map(lambda a: a[None], told)
        for i in np.argwhere(told.valid):
            row = held[told.rows[tuple(i)]]
            if row is not None and row.ticket.reason is None:
                self._made(row, told, tuple(i))
        self._measure(self._figures["tokens"] - before)

    def _made(self, row: Row, told: Told, i: tuple[int, int]) -> None:
        """A token of a row, that at [i] of those that a launch tells."""
        drawn, ticket = told.drawn, row.ticket
        request, k = ticket.request, ticket.request.likeliest
        if ticket.last is not None:
            depth, begins = int(told.depth[i]), tuple(bool(b) for b in told.begins[i[0], :, i[1]])
            flops = self._flops(ticket, depth, begins)
            self._hand_out(ticket, ticket.last._replace(depth=depth, begins=begins, flops=flops))
            self._count(passes=depth)
        likeliest = tuple(zip(drawn.ids[i][:k].tolist(), drawn.logs[i][:k].tolist(), strict=True))
        ticket.last = Made(int(drawn.token[i]), float(drawn.logprob[i]), likeliest)
        ticket.made.append(ticket.last.token)
        if drawn.ended[i]:
            self._hand_out(ticket, ticket.last)
            self._release(row, "end" if ticket.last.token == request.end else "length")

    def _flops(self, ticket: Ticket, depth: int, begins: tuple[bool, ...]) -> float:
        """What the last token of a row cost when it was read."""
        place = len(ticket.request.prompt) + len(ticket.made) - 1
        if not ticket.chunks:  # those of the prompt are not counted one by one: as many as usual
            ticket.chunks = self._costs.usual(place)
        begun = sum(begins)
        flops = self._costs.token(depth, [place, *ticket.chunks[:begun]])
        ticket.chunks = [n + (s < begun) for s, n in enumerate(ticket.chunks)]
        return flops

    def _measure(self, tokens: int) -> None:
        """The rate of the last few seconds, after so many tokens more."""
        now = time.monotonic()
        passed, self._settled = now - self._settled, now
        if 0 < passed < 1:  # else nothing was asked for in between
            self._rate += (tokens / passed - self._rate) * passed / 2

    def _hand_out(self, ticket: Ticket, made: Made) -> None:
        self._count(tokens=1)
        ticket.push(made)

    def _end(self, ticket: Ticket, reason: Reason, error: BaseException | None = None) -> None:
        self._markers.pop(ticket, None)
        super()._end(ticket, reason, error)
