"""Whether the processes of a job see one workdir: each looks for what process 0 put there."""

import contextlib
import secrets
import time
from typing import Any

import jax
import numpy as np

from adaptive.errors import CheckpointError
from adaptive.parallel.cluster import host_of

LOOK_S = 10.0  # network file systems show a new file this late


def check_shared(folder: Any) -> None:
    """Returns if every process of the job sees the workdir of process 0; all must call it, after process 0 has made it.

    folder  its path as each process has it, or an `etils.epath.Path` in a bucket

    Raises CheckpointError, in every process, that names the hosts which do not.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    primary, number = jax.process_index() == 0, np.uint32(secrets.randbits(32))
    number = multihost_utils.broadcast_one_to_all(number)
    mark = folder / f".seen-by-all-{int(number):08x}"
    try:
        if primary:
            with contextlib.suppress(OSError):  # of what cannot be written others tell
                mark.write_bytes(b"")
        multihost_utils.process_allgather(np.array(True))  # the file is there
        seen = np.asarray(multihost_utils.process_allgather(np.array(primary or _seen(mark))))
    finally:
        if primary:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)
    if not seen.all():
        blind = [int(i) for i in np.flatnonzero(~seen)]
        named = ", ".join(f"process {i}{host_of(i)}" for i in blind[:8]) + (" and more" if len(blind) > 8 else "")
        raise CheckpointError(
            f"the workdir {folder} is not the same folder for all processes of the job: {named} cannot see what "
            f"process 0{host_of(0)} wrote there. Give --workdir on storage that all of them share, or an address "
            "such as gs://bucket/run"
        )


def _seen(mark: Any) -> bool:
    due = time.monotonic() + LOOK_S
    while not mark.exists():
        if time.monotonic() > due:
            return False
        time.sleep(0.2)
    return True
