"""A request on its way: its tickets, and the text that comes of them."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from adaptive.inference.requests import Full, Made, Reason, Ticket
from adaptive.serving import tickets
from adaptive.serving.answers import Ended, Usage
from adaptive.serving.asked import Asked
from adaptive.serving.errors import busy, failed, late, stopping
from adaptive.serving.metrics import Metrics
from adaptive.serving.served import Served
from adaptive.serving.texts import Piece, Texts


class Event(NamedTuple):
    """Some text of a choice, or with `ended` its last."""

    number: int
    piece: Piece
    ended: Ended | None = None


class Running:
    """A request that the engine has taken on. Raises Refused where it does not."""

    def __init__(self, asked: Asked, served: Served, metrics: Metrics):
        self._asked, self._served, self._metrics = asked, served, metrics
        self._begin = time.perf_counter()
        self._drawn = 0
        self._tickets = self._submitted()
        self._last: list[float | None] = [None] * len(self._tickets)  # when a token came
        for prompt in asked.prompts:
            metrics.count("prompt_tokens", len(prompt))

    async def events(self) -> AsyncGenerator[Event]:
        """All of it, as it comes. Raises Refused where it cannot be finished; when it is closed the engine is told."""
        prompts = [self._asked.prompt_of(i).tolist() for i in range(len(self._tickets))]
        texts = [Texts(self._served.tokenizer, prompt, self._asked.stops) for prompt in prompts]
        async with aclosing(tickets.read(self._tickets)) as coming:
            async for number, what in coming:
                text = texts[number]
                if text.stopped:
                    continue
                event = self._made(number, text, what) if isinstance(what, Made) else self._ended(number, text, what)
                if event.piece.text or event.piece.tokens or event.ended:
                    yield event
        self._metrics.whole.add(time.perf_counter() - self._begin)

    def _made(self, number: int, text: Texts, made: Made) -> Event:
        self._last[number] = self._timed(self._last[number])
        self._counted(made)
        if made.token == self._asked.requests[number].end:
            return Event(number, Piece())
        piece = text.push(made)
        if not text.stopped:
            return Event(number, piece)
        self._tickets[number].cancel()
        self._metrics.count("choices", ended="stop")
        return Event(number, piece, "stop")

    def _ended(self, number: int, text: Texts, why: Reason) -> Event:
        self._metrics.count("choices", ended=why)
        self._metrics.failures += why == "failed"
        if why not in ("end", "length"):
            raise {"deadline": late(self._served.seconds), "cancelled": stopping()}.get(why) or failed()
        piece = text.finish()
        return Event(number, piece, "stop" if why == "end" or text.stopped else "length")

    def usage(self) -> Usage:
        """So far."""
        return Usage(sum(map(len, self._asked.prompts)), self._drawn)

    def _submitted(self) -> list[Ticket]:
        taken: list[Ticket] = []
        try:
            for request in self._asked.requests:
                taken.append(self._served.engine.submit(request))
        except BaseException as error:
            for ticket in taken:
                ticket.cancel()
            if isinstance(error, Full):
                raise busy(error.seconds) from None
            if isinstance(error, RuntimeError):  # it takes requests until the server has finished all
                self._metrics.failures += 1
                raise stopping() from None
            raise
        return taken

    def _timed(self, before: float | None) -> float:
        now = time.perf_counter()
        if before is None:
            self._metrics.first.add(now - self._begin)
        else:
            self._metrics.between.add(now - before)
        return now

    def _counted(self, made: Made) -> None:
        self._drawn += 1
        self._metrics.count("tokens")
        if made.depth is not None:
            self._metrics.count("passes", made.depth)
        if made.flops is not None:
            self._metrics.count("flops", made.flops)
