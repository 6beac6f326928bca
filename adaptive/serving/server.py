"""A server on a socket of this process, from its start to the end of what it took on."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from adaptive.errors import UserError

try:
    import uvicorn

    from adaptive.serving.app import application
except ModuleNotFoundError as error:
    if error.name not in ("starlette", "uvicorn"):
        raise
    raise UserError(f"{error.name} is not installed, which serving needs: pip install 'adaptive-lm[serve]'") from None

from adaptive.serving.served import Served

OWN = frozenset({"localhost", "127.0.0.1", "[::1]"})  # names by which a machine calls itself
AFTER_S = 90.0  # for clients to read the last of what was made


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can reach yet. Raises UserError where the address is none of this machine's, or is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {why}") from None
    return made


def is_loopback(made: socket.socket) -> bool:
    """Whether this machine alone can reach it."""
    return ipaddress.ip_address(made.getsockname()[0].partition("%")[0]).is_loopback


def address(made: socket.socket) -> str:
    host, port = made.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(served: Served, made: socket.socket, host: str, key: str) -> bool:
    """Answers until a SIGTERM or Ctrl-C, then finishes what it took on, unless a second Ctrl-C comes: whether none did.

    host  as the user named it, key as requests must carry it
    """
    hosts = None if key else OWN | {host.lower()}
    config = uvicorn.Config(
        application(served, key=key, hosts=hosts), lifespan="off", log_config=None, access_log=False, ws="none",
        server_header=False, timeout_graceful_shutdown=int(served.seconds + AFTER_S),
    )  # fmt: skip
    server = _Server(config)
    asyncio.run(server.serve(sockets=[made]))
    return not server.force_exit


class _Server(uvicorn.Server):
    """Ends with what it returns, not by the signal that ended it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, self._end, each)
        try:
            yield
        finally:
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)

    def _end(self, number: Any) -> None:
        left = len(self.server_state.tasks)
        if not self.should_exit:
            print(f"finishes {left} requests; Ctrl-C gives them up", file=sys.stderr, flush=True)
        self.handle_exit(number, None)
