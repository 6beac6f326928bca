"""Which checkpoints a run keeps: plain data."""

import dataclasses

from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = ranged(100, least=0)  # steps; 0: only at the end
    keep_last: int = ranged(2, least=1)
    keep_every: int = ranged(0, least=0)  # also keep each checkpoint whose step is a multiple; 0: none
