"""Which process of a job keeps the others waiting for its data.

A step ends for all processes at once, behind its collectives, so that their step times tell nothing. What differs is
how long each waits for data before its step. A device that computes slowly shows on no host's clock: a profile
(log.profile_steps) tells it.
"""

import time

import jax
import numpy as np

MOST = 0.03  # share of the time that one may wait more than a usual one


class Stragglers:
    """Sums what this process waits, and compares it over all processes now and then."""

    def __init__(self) -> None:
        self._waited, self._since = 0.0, time.monotonic()

    def add(self, seconds: float) -> None:
        self._waited += seconds

    def compared(self) -> str:
        """What is to be said of the slowest since the last call, in every process the same; empty where none lags. All
        processes must call it, at the same step."""
        now = time.monotonic()
        own, whole, self._waited, self._since = self._waited, now - self._since, 0.0, now
        if jax.process_count() == 1:
            return ""
        from jax.experimental import multihost_utils

        return slowest(np.asarray(multihost_utils.process_allgather(np.array([own, whole], np.float32))))


def slowest(seconds: np.ndarray) -> str:
    """seconds: f32[processes, 2], that each waited, and that passed."""
    waited = seconds[:, 0]
    which, usual = int(np.argmax(waited)), float(np.median(waited))
    if waited[which] - usual <= MOST * seconds[which, 1]:
        return ""
    return (
        f"process {which} keeps the others waiting: since the checkpoint before it waited {waited[which]:.1f} s of "
        f"{seconds[which, 1]:.1f} s for its data, a usual one {usual:.1f} s"
    )
