"""Tokens of several requests to an engine, read by threads for one event loop."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Sequence

from adaptive.inference.requests import Made, Reason, Ticket

log = logging.getLogger("adaptive.serving")


async def read(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Made | Reason]]:
    """(number of the ticket, its next token or why it ended), as they come. All are cancelled when this is closed."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Made | Reason]]()

    def put(number: int, what: Made | Reason) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
            loop.call_soon_threadsafe(queue.put_nowait, (number, what))

    def pump(number: int, ticket: Ticket) -> None:
        try:
            for made in ticket:
                put(number, made)
            put(number, ticket.reason or "failed")
        except Exception:  # whatever ends an engine ends this request, and not the thread alone
            log.exception("the engine failed")
            put(number, "failed")

    for number, ticket in enumerate(tickets):
        threading.Thread(target=pump, args=(number, ticket), name="ticket", daemon=True).start()
    left = len(tickets)
    try:
        while left:
            number, what = await queue.get()
            left -= not isinstance(what, Made)
            yield number, what
    finally:
        for ticket in tickets:
            ticket.cancel()
