"""A process that makes batches for another one (see `workers`): `python -m adaptive.data.worker DESCRIPTOR`."""

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection

from adaptive.data.workers import answer


def main() -> None:
    # Stopping is the run's to decide, which wants batches until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    job = pickle.load(sys.stdin.buffer)
    sys.path[:] = job.path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer(Connection(int(sys.argv[1]), readable=False), job)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
