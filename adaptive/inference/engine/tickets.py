"""What a request is on its way through an engine."""

import dataclasses
import itertools
import queue
import time
from collections.abc import Callable, Iterator

import numpy as np

from adaptive.inference.requests import Made, Reason, Request

_NUMBERS = itertools.count()


class Ticket:
    """A request that was taken on; see `requests.Ticket`. The engine's thread alone calls `push` and `end`.

    number  tells those apart that came before it
    made    tokens so far
    last    the token that was drawn last; it is handed out when it has been read, or is the last one
    chunks  how many chunks of each stage have begun, of an H-Net
    begin   when it was taken on, and `times` when its tokens were handed out, by `time.perf_counter`
    """

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request, self._wake, self.number = request, wake, next(_NUMBERS)
        self.deadline = None if request.seconds is None else time.monotonic() + request.seconds
        self.made: list[int] = []
        self.last: Made | None = None
        self.chunks: list[int] = []
        self.begin, self.times = time.perf_counter(), list[float]()
        self._come: queue.SimpleQueue[Made | BaseException | None] = queue.SimpleQueue()
        self._reason: Reason | None = None
        self._cancelled = self._read = False

    def __iter__(self) -> Iterator[Made]:
        while not self._read:
            one = self._come.get()
            if isinstance(one, Made):
                yield one
                continue
            self._read = True
            if one is not None:
                raise one

    def cancel(self) -> None:
        self._cancelled = True
        self._wake()

    @property
    def reason(self) -> Reason | None:
        return self._reason

    def given_up(self, now: float) -> Reason | None:
        """Why nothing more is wanted of it; None: more is."""
        if self._cancelled:
            return "cancelled"
        return "deadline" if self.deadline is not None and now >= self.deadline else None

    def push(self, one: Made) -> None:
        self.times.append(time.perf_counter())
        self._come.put(one)

    def end(self, reason: Reason, error: BaseException | None = None) -> None:
        if self._reason is None:
            self._reason = reason
            self._come.put(error)


@dataclasses.dataclass
class Row:
    """A ticket that has a row.

    tokens   i32[n] to read before the next is drawn: the prompt, and what had been made before it lost another row
    read     of them read, or being read
    since    how many tokens had been made when it got the row
    """

    ticket: Ticket
    tokens: np.ndarray
    read: int = 0
    since: int = 0

    @property
    def reading(self) -> bool:
        return self.read < len(self.tokens)
