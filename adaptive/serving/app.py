"""The addresses of a server, as an ASGI application."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adaptive.serving import asked as asking
from adaptive.serving.answers import ChatCompletion, Completion, Shape
from adaptive.serving.asked import Asked
from adaptive.serving.errors import Refused
from adaptive.serving.fields import Fields, parsed
from adaptive.serving.guard import Guard
from adaptive.serving.metrics import KIND, Metrics
from adaptive.serving.running import Event, Running
from adaptive.serving.served import Served
from adaptive.serving.texts import Piece

MOST_BYTES = 4 << 20  # of a request's body
BODY_S = 30.0  # in which it must have come
SEND_S = 60.0  # in which a client must have read what it is sent, else it is taken to be gone
GONE = 499  # the client went before it was answered; for the metrics alone
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"

T = TypeVar("T")
Read = Callable[[Fields, Served], Asked]
Shaped = Callable[[Served, Asked], Shape]


def application(served: Served, *, key: str = "", hosts: frozenset[str] | None = None) -> ASGIApp:
    """What answers requests with the model.

    key    that requests must carry; "": none
    hosts  names that requests may call the server by; None: any
    """
    state = App(served)
    routes = [
        Route("/", state.page),
        Route("/health", state.health),
        Route("/metrics", state.told),
        Route("/v1/models", state.models),
        Route("/v1/models/{name:path}", state.model),
        Route("/v1/completions", state.completions, methods=["POST"]),
        Route("/v1/chat/completions", state.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        Refused: _refused, HTTPException: _no_such, ClientDisconnect: _gone, Exception: _unexpected,
    }  # fmt: skip
    inner = Starlette(routes=routes, exception_handlers=handlers)
    paths = frozenset(route.path for route in routes)
    return Guard(inner, state.metrics, key=key, hosts=hosts, paths=paths)


class App:
    def __init__(self, served: Served):
        self._served, self.metrics, self._begin = served, Metrics(), int(time.time())
        self._page = resources.files("adaptive.serving").joinpath("page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _POLICY})

    async def health(self, request: Request) -> Response:
        failed = self.metrics.failures > 0
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def told(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self._served.engine.figures()), media_type=KIND)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._served.name:
            raise asking.no_model(name, self._served)
        return JSONResponse(self._about())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, asking.completion, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, asking.chat, ChatCompletion)

    def _about(self) -> dict[str, Any]:
        about = {"id": self._served.name, "object": "model", "created": self._begin, "owned_by": "adaptive"}
        return about | {"details": self._served.about()}

    async def _answer(self, request: Request, read: Read, shaped: Shaped) -> Response:
        content = await _body(request)
        # A long prompt takes a while to encode: others are answered meanwhile.
        asked = await asyncio.to_thread(lambda: read(parsed(content), self._served))
        running = Running(asked, self._served, self.metrics)
        shape, events = shaped(self._served, asked), running.events()
        if asked.stream:
            # Before the first text it may still be refused with a status of its own.
            first = await unless_gone(request.receive, anext(events))
            return Stream(first, events, running, shape, asked)
        return JSONResponse(await unless_gone(request.receive, _whole(events, running, shape, asked)))


class Stream(Response):
    """Server-sent events: each part as it comes, and [DONE]."""

    def __init__(self, first: Event, rest: AsyncGenerator[Event], running: Running, shape: Shape, asked: Asked):
        super().__init__(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._first, self._rest, self._running, self._shape, self._asked = first, rest, running, shape, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect, TimeoutError):  # nobody reads it
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._rest) as rest:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                for number in range(len(self._asked.requests)):
                    await _put(send, self._shape.opening(number))
                await self._parts(send, self._first)
                async for event in rest:
                    await self._parts(send, event)
                if self._asked.usage:
                    await _put(send, self._shape.usage(self._running.usage()))
            except Refused as refused:  # too late for a status
                await _put(send, refused.body())
            await _put(send, "[DONE]")
            await send({"type": "http.response.body", "body": b""})

    async def _parts(self, send: Send, event: Event) -> None:
        if event.piece.text or event.piece.tokens:
            await _put(send, self._shape.part(event.number, event.piece, None))
        if event.ended:
            await _put(send, self._shape.part(event.number, Piece(), event.ended))


async def _put(send: Send, event: dict[str, Any] | str | None) -> None:
    if event is None:
        return
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    async with asyncio.timeout(SEND_S):
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


async def _whole(events: AsyncGenerator[Event], running: Running, shape: Shape, asked: Asked) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in asked.requests]
    ended: list[Any] = [None] * len(pieces)
    async with contextlib.aclosing(events):
        async for event in events:
            pieces[event.number].append(event.piece)
            ended[event.number] = event.ended
    joined = [Piece("".join(p.text for p in parts), tuple(t for p in parts for t in p.tokens)) for parts in pieces]
    choices = [shape.choice(i, piece, why) for i, (piece, why) in enumerate(zip(joined, ended, strict=True))]
    return shape.whole(choices, running.usage())


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives. Ends it, and raises ClientDisconnect, when the client goes."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Raises Refused for another kind than JSON, and for what is too long or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also: no page of another site can send this unasked
        raise Refused(415, "the request's Content-Type must be application/json", code="unsupported_media_type")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                content += part
                if len(content) > MOST_BYTES:
                    raise Refused(413, f"the body is longer than {MOST_BYTES:,} bytes", code="too_large")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_S:g} s", code="timeout") from None
    return bytes(content)


# Errors


async def _refused(request: Request, error: Refused) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _no_such(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path[:100]}"
    message = {404: f"there is nothing at {what}", 405: f"{what} is not possible here"}.get(
        error.status_code, error.detail
    )
    refused = Refused(error.status_code, message, headers=error.headers)
    return await _refused(request, refused)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _unexpected(request: Request, error: Exception) -> Response:
    return await _refused(request, Refused(500, "something failed here; the server's log says what"))
