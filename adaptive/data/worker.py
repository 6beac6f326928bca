"""A process that makes batches for another one (see `workers`): `python -m adaptive.data.worker DESCRIPTOR`."""

import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from adaptive.data.pipeline import open_data
from adaptive.data.workers import Job
from adaptive.errors import DataError, UserError


def main() -> None:
    # Stopping is the run's to decide, which wants batches until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    job = pickle.load(sys.stdin.buffer)
    sys.path[:] = job.path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer(Connection(int(sys.argv[1]), readable=False), job)


def answer(batches: Connection, job: Job) -> None:
    """What a worker does: sends batch after batch, and an error instead of the one that it could not make."""
    try:
        shard = (job.shard.index, job.shard.count)
        data = open_data(job.config, batch_size=job.shard.batch_size, vocab_size=job.vocab_size, shard=shard)
        train = data.train(job.state)
        for batch in train:
            batches.send(((batch, train.state()), None))
    except BrokenPipeError:  # nobody wants more
        return
    except UserError as error:
        batches.send((None, error))
    except Exception as error:
        traceback.print_exc()
        batches.send((None, DataError(f"a worker of data.workers failed: {error!r} (its traceback is above)")))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
