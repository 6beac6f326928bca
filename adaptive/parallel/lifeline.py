"""A line between the processes of a job, over which each learns at once that another has gone.

Process 0 listens; every other one keeps a connection to it and says goodbye before it ends in order. A connection that
breaks without goodbye tells who was lost, and process 0 tells the others. Collectives would say it too, later, in words
that name nobody. A process that was asked to stop, and ends there and then, says that instead, so that the others end
as it does.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

_GOODBYE = "goodbye"
_STOPPED = "stopped "  # and who


class Lifeline:
    """`lost` is called once, from a thread, with who has gone, "process 2 on host-b", and whether it was asked to stop.

    Make it with `listen` on process 0 and with `connect` on the others.
    """

    def __init__(self, lost: Callable[[str, bool], None]):
        self._lost = lost
        self._lock = threading.Lock()
        self._peers: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        self._ended = False
        self._gone = ""  # who was lost, for those who connect later
        self.told = threading.Event()  # set when `lost` was called

    @classmethod
    def listen(cls, lost: Callable[[str, bool], None], processes: int) -> "tuple[Lifeline, int]":
        """The line of process 0, and the port that the others connect to."""
        line = cls(lost)
        line._server = socket.create_server(("", 0), backlog=processes)
        threading.Thread(target=line._accept, args=(processes,), name="lifeline", daemon=True).start()
        return line, line._server.getsockname()[1]

    @classmethod
    def connect(cls, lost: Callable[[str, bool], None], host: str, port: int, index: int) -> "Lifeline":
        """The line of process `index`. Raises OSError where process 0 cannot be reached at the port."""
        line = cls(lost)
        peer = socket.create_connection((host, port), timeout=5)
        peer.settimeout(None)
        _keep_alive(peer)
        peer.sendall(f"{index} {socket.gethostname()}\n".encode())
        line._peers[0] = peer
        threading.Thread(target=line._read, args=(peer,), name="lifeline", daemon=True).start()
        return line

    def close(self, stopped: str = "") -> None:
        """Says goodbye: this process ends in order. stopped: who this is, where it was asked to stop and the others,
        which have not been, are to end with it."""
        with self._lock:
            self._ended = True
            peers = list(self._peers.values())
        for peer in peers:
            _send(peer, f"{_STOPPED}{stopped}" if stopped else _GOODBYE)
        if self._server is not None:
            self._server.close()

    def _accept(self, processes: int) -> None:
        assert self._server is not None
        for _ in range(processes - 1):
            try:
                peer, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(peer,), name="lifeline", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Process 0: one other process, until it says goodbye or is lost."""
        _keep_alive(peer)
        lines = _lines(peer)
        index, _, host = next(lines, "").partition(" ")
        if not (index.isascii() and index.isdecimal()):
            peer.close()
            return
        with self._lock:
            self._peers[int(index)] = peer
            gone = self._gone
        if gone:
            _send(peer, gone)
        word = next(lines, "")
        if word != _GOODBYE:
            who = f"process {index} on {host}"
            self._tell(f"{_STOPPED}{who}" if word.startswith(_STOPPED) else who, int(index))

    def _read(self, peer: socket.socket) -> None:
        word = next(_lines(peer), "")
        if word != _GOODBYE:
            self._tell(word or "process 0", 0)

    def _tell(self, who: str, index: int) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended, self._gone = True, who
            peers = [peer for other, peer in self._peers.items() if other != index]
        for peer in peers:
            _send(peer, who)
        self.told.set()
        self._lost(who.removeprefix(_STOPPED), who.startswith(_STOPPED))


def _keep_alive(peer: socket.socket) -> None:
    """Breaks the connection within a minute where the other machine is gone without a word."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # on Linux, and on macOS in part
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _lines(peer: socket.socket) -> Iterator[str]:
    with peer.makefile("r", encoding="utf-8", errors="replace") as file:
        try:
            for line in file:
                yield line.rstrip("\n")
        except OSError:
            return


def _send(peer: socket.socket, word: str) -> None:
    with contextlib.suppress(OSError):  # it is gone as well
        peer.sendall(f"{word}\n".encode())
