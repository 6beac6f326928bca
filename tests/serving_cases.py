"""An engine that answers from a table, a client that calls the application without a socket, and a server with one."""

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import queue
import signal
import threading
import time
import urllib.request

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.requests import Full, Made
from adaptive.serving import server
from adaptive.serving.app import application
from adaptive.serving.chat import Plain
from adaptive.serving.served import Served

END = 256


class Answer:
    """A ticket. It holds what it will say until `go` is set."""

    def __init__(self, engine, request, made):
        self.engine, self.request, self._made = engine, request, made
        self.cancelled, self.reason = threading.Event(), None

    def __iter__(self):
        self.engine.go.wait(20)
        if self.engine.error:
            self.reason = "failed"
            raise self.engine.error
        for made in self._made[: self.request.tokens]:
            if self.cancelled.is_set() or self.engine.late:
                break
            yield made
            if made.token == self.request.end:
                self.reason = "end"
        if self.engine.hang:
            self.cancelled.wait(20)
        self.reason = (
            "cancelled" if self.cancelled.is_set() else "deadline" if self.engine.late else self.reason or "length"
        )
        self.engine.ended.put(self.reason)

    def cancel(self):
        self.cancelled.set()


class Engine:
    """Continues every prompt with the same bytes.

    text   that it says; then the end token, if `end`
    most   requests that it takes at once
    late   its requests end by their deadline; hang: after their text nothing comes; error: what it fails with
    """

    def __init__(self, text=b" word", *, end=True, most=64):
        self.text, self.end, self.most = text, end, most
        self.late, self.hang, self.error, self.closed = False, False, None, False
        self.go, self.ended, self.taken = threading.Event(), queue.Queue(), []
        self.go.set()

    def refuse(self, request):
        return "prompts of 13 bring bad luck" if len(request.prompt) == 13 else ""

    def submit(self, request):
        if self.closed:
            raise RuntimeError("closed")
        if sum(ticket.reason is None for ticket in self.taken) >= self.most:
            raise Full("full", 2.5)
        made = [self._made(i, token, request) for i, token in enumerate([*self.text, *[END] * self.end])]
        self.taken.append(Answer(self, request, made))
        return self.taken[-1]

    def _made(self, i, token, request):
        likeliest = ((token, -0.5 * i), (0xE2, float("-inf")))[: request.likeliest]
        return Made(token, -0.5 * i, likeliest, 1 + i % 3, (i % 2 == 0,), 1e6 * (1 + i % 3))

    def figures(self):
        return {"waiting": 0.0, "requests": float(len(self.taken))}

    def close(self, *, finish=True):
        self.closed = True


def served(engine, **others):
    tokenizer = load_tokenizer("bytes")
    made = Served("made", 7, tokenizer, engine, 64, 3, 1, Plain(tokenizer), 5.0)
    return dataclasses.replace(made, **others)


class Client:
    """Calls the application as a server would. others: what differs from `served`, or that itself."""

    def __init__(self, engine=None, *, key="", hosts=None, **others):
        self.engine = engine or Engine()
        self.app = application(others.get("served") or served(self.engine, **others), key=key, hosts=hosts)

    def ask(self, path, body=None, *, method=None, headers=(), leaves=None, stalls=False):
        """(status, headers, body) of a request. body: JSON, or bytes; leaves: messages after which the client goes;
        stalls: more of the body is said to come."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if body is not None else {}
        given = {"host": "localhost:1", **kind, **dict(headers)}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": method or ("GET" if body is None else "POST"), "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip
        return asyncio.run(self._call(scope, content, leaves, stalls))

    async def _call(self, scope, content, leaves, stalls):
        sent, gone, asked = [], asyncio.Event(), []

        async def receive():
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": content, "more_body": stalls}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if leaves is not None and len(sent) > leaves:
                gone.set()

        if leaves == 0:
            asyncio.get_running_loop().call_later(0.1, gone.set)
        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent[1:])
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]} if sent else {}
        return sent[0]["status"] if sent else None, headers, body

    def json(self, path, body=None, **how):
        status, _, content = self.ask(path, body, **how)
        return status, json.loads(content)

    def events(self, path, body, **how):
        status, headers, content = self.ask(path, body | {"stream": True}, **how)
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), content
        parts = content.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def while_serving(call, engine, *, host="127.0.0.1", key="", ends=False, **others):
    """(what `call` gives, called with the server's address in a thread; what `serve` does). ends: `call` ends it."""
    made = server.bound(host, 0)
    address = server.address(made)

    def client():
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                except OSError:
                    time.sleep(0.02)
            given = call(address)
        except BaseException:
            for _ in range(2):  # at once, whatever it waits for
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            raise
        if not ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return given

    with concurrent.futures.ThreadPoolExecutor() as threads:
        given = threads.submit(client)
        finished = server.serve(served(engine, **others), made, host, key)
        return given.result(timeout=20), finished
