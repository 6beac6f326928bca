"""What engines have in common: requests are taken on, wait for a row, and are computed by a thread of the engine's."""

import collections
import logging
import threading
import time
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np

from adaptive.inference.engine.tickets import Ticket
from adaptive.inference.requests import Full, Reason, Request

log = logging.getLogger(__name__)


class Holds(Protocol):
    """What has a row: a ticket, and what an engine knows of it."""

    @property
    def ticket(self) -> Ticket: ...


Held = TypeVar("Held", bound=Holds)


class Desk(Generic[Held]):
    """An engine (`requests.Engine`) but for what its rows compute, which is `_round`. `_start` begins it.

    rows, length, queue  as of `engine.Engine`
    vocab                ids from here on are in no prompt; None: any may be
    """

    counted: ClassVar[tuple[str, ...]] = ()  # of its figures, those that begin at 0 beside requests and tokens

    def __init__(self, rows: int, length: int, queue: int, vocab: int | None):
        self.rows, self.length, self._queue, self._vocab = rows, length, queue, vocab
        self._held: list[Held | None] = [None] * rows
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._closing: str = ""  # "finish" or "drop"
        self._error: BaseException | None = None
        self._figures: collections.Counter[str] = collections.Counter()
        self._rate = 0.0  # tokens per second of late
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _start(self) -> None:
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(finish=kind is None)

    # Called by any thread

    def refuse(self, request: Request) -> str:
        n, ids = len(request.prompt), np.asarray(request.prompt)
        if n == 0:
            return "the prompt is empty: give at least one token"
        if ids.min() < 0 or (self._vocab is not None and ids.max() >= self._vocab):
            known = "0 and above" if self._vocab is None else f"0 to {self._vocab - 1}"
            return f"the prompt has ids outside of the vocabulary, {known}"
        if request.tokens < 1:
            return f"tokens={request.tokens}: ask for at least 1"
        if n + request.tokens > self.length:
            return (
                f"{n} tokens of the prompt and {request.tokens} to make are {n + request.tokens}; a sequence has at "
                f"most {self.length}"
            )
        for name in ("seed", "stream"):
            if not 0 <= (number := getattr(request, name)) < 2**32:
                return f"{name}={number}: must be 0 to {2**32 - 1}"
        return ""

    def submit(self, request: Request) -> Ticket:
        if reason := self.refuse(request):
            raise ValueError(reason)
        with self._changed:
            if self._error is not None:
                raise RuntimeError(f"the engine failed: {self._error}") from self._error
            if self._closing:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self._queue:
                raise Full(f"{self._queue} requests wait already", self._until_room())
            ticket = Ticket(request, self._wake)
            self._waiting.append(ticket)
            self._figures["requests"] += 1
            self._changed.notify_all()
        return ticket

    def figures(self) -> dict[str, float]:
        with self._changed:
            counted = dict(self._figures)
            state = {
                "waiting": len(self._waiting),
                "running": sum(row is not None for row in self._held),
                "rows": self.rows,
                "tokens_per_second": self._rate,
            }
        ends = tuple(f"ended_{reason}" for reason in Reason.__args__)  # type: ignore[attr-defined]
        return dict.fromkeys(("requests", "tokens", *self.counted, *ends), 0.0) | counted | state

    def close(self, *, finish: bool = True) -> None:
        with self._changed:
            self._closing = "drop" if not finish else self._closing or "finish"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _until_room(self) -> float:
        """Seconds in which the first of the sequences that run should end."""
        left = [row.ticket.request.tokens - len(row.ticket.made) for row in self._held if row is not None]
        return max(1.0, min(left, default=0) * max(1, len(left)) / self._rate if self._rate else 1.0)

    # The engine's own thread

    def _run(self) -> None:
        try:
            while self._more():
                self._give_up()
                self._round()
        except BaseException as error:
            log.exception("the engine failed")
            with self._changed:
                self._error = error
        finally:
            with self._changed:
                left = [row.ticket for row in self._held if row is not None] + list(self._waiting)
                self._held, self._closing = [None] * self.rows, self._closing or "drop"
                self._waiting.clear()
            for ticket in left:
                self._end(ticket, "cancelled" if self._error is None else "failed", self._error)

    def _round(self) -> None:
        """Gives rows to tickets that wait, and computes something."""
        raise NotImplementedError

    def _busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting) or any(row is not None for row in self._held)

    def _more(self) -> bool:
        """Waits until there is something to do; whether there will be."""
        with self._changed:
            while True:
                if self._closing == "drop" or (self._closing and not self._busy()):
                    return False
                if self._busy():
                    return True
                self._changed.wait()

    def _give_up(self) -> None:
        """Lets go of what nobody wants any more."""
        now = time.monotonic()
        with self._changed:
            gone = [(ticket, why) for ticket in self._waiting if (why := ticket.given_up(now))]
            for ticket, _ in gone:
                self._waiting.remove(ticket)
        for ticket, why in gone:
            self._end(ticket, why)
        for row in list(self._held):
            if row is not None and (why := row.ticket.given_up(now)):
                self._release(row, why)

    def _release(self, row: Held, reason: Reason) -> None:
        """Ends what has a row, which others may have then."""
        with self._changed:
            self._held = [None if own is row else own for own in self._held]
        self._end(row.ticket, reason)

    def _end(self, ticket: Ticket, reason: Reason, error: BaseException | None = None) -> None:
        self._count(**{f"ended_{reason}": 1})
        ticket.end(reason, error)

    def _count(self, **more: int) -> None:
        with self._changed:
            self._figures.update(more)
