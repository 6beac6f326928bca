"""What a request is answered with when it gets no text, in the form of OpenAI's errors."""

import math
from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """A request that is not done.

    status   of HTTP
    param    dotted path of the field that is wrong; "": none is
    code     a word for programs; "": none
    headers  that the answer has besides
    """

    def __init__(
        self, status: int, message: str, *, param: str = "", code: str = "", headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": ...}"""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        about = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": about}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


def busy(seconds: float) -> Refused:
    """Too many wait; there may be room in so many seconds."""
    after = str(max(1, math.ceil(seconds)))
    message = f"too many requests wait already; ask again in {after} s"
    return Refused(429, message, code="rate_limit_exceeded", headers={"Retry-After": after})


def late(seconds: float) -> Refused:
    message = f"it was not done within the {seconds:g} s that a request may take (--timeout)"
    return Refused(504, message, code="timeout", headers={"x-should-retry": "false"})  # which OpenAI's clients obey


def stopping() -> Refused:
    return Refused(503, "the model computes no more: the server is about to end, or its log says why", code="stopping")


def failed() -> Refused:
    return Refused(500, "the model failed while it computed this; the server's log says how", code="engine_failed")
