"""Which checkpoints a run keeps: plain data."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps; 0: only at the end
    keep_last: int = 2
    keep_every: int = 0  # also keep each checkpoint whose step is a multiple; 0: none
