"""Who may ask: a key, and the names that the server may be called by. Counts what all are answered."""

import hmac
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaptive.serving.errors import Refused
from adaptive.serving.metrics import Metrics

OPEN = ("/", "/health")  # hold nothing that a key protects


class Guard:
    """Around an application; see `app.application`. paths: that are counted under their own names."""

    def __init__(
        self, inner: ASGIApp, metrics: Metrics, *, key: str, hosts: frozenset[str] | None, paths: frozenset[str]
    ):
        self._inner, self._metrics, self._paths = inner, metrics, paths
        self._key, self._hosts = key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count("responses", path=path, code=str(message["status"]))
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refuse(scope["path"], headers)
        if refused is None:
            return await self._inner(scope, receive, counted)
        body = json.dumps(refused.body()).encode()
        about = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
        fields = [(name.encode(), value.encode()) for name, value in about.items()]
        await counted({"type": "http.response.start", "status": refused.status, "headers": fields})
        await counted({"type": "http.response.body", "body": body})

    def _refuse(self, path: str, headers: Mapping[bytes, bytes]) -> Refused | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _without_port(host) not in self._hosts:
            # A page of another site whose name was made to mean this machine.
            return Refused(403, "this server answers on this machine's own names alone; start it with --key for others")
        if not self._key or path in OPEN:
            return None
        given = headers.get(b"authorization", b"")
        if given[:7].lower() == b"bearer " and hmac.compare_digest(given[7:].strip(), self._key):
            return None
        message = (
            "a key is needed: send it as 'Authorization: Bearer KEY'" if not given else "the key is not the server's"
        )
        return Refused(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
