"""What a run begins from, and which checkpoints it keeps: plain data."""

import dataclasses

from adaptive.errors import RecipeError
from adaptive.settings import ranged, since


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a new run begins from in place of parameters drawn from the seed: its steps, schedule and data are its own.

    The command's --init_from RUN[@STEP] sets `run` and `step`.
    """

    run: str = ""  # workdir of another run; empty: none
    step: int = ranged(0, least=0)  # of the checkpoint there
    optimizer: bool = False  # take its optimizer's state as well: moments, but not the place in the schedule
    # Parameters that are drawn from the seed all the same: their paths, as in embedding or body/core/*, or what these
    # begin with.
    fresh: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raises RecipeError for settings that say nothing without a run."""
        if not self.run and self != InitConfig():
            raise RecipeError("init.step, init.optimizer and init.fresh need init.run, or --init_from RUN[@STEP]")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = ranged(100, least=0)  # steps; 0: only at the end
    every_s: float = since(0.0, before=0.0, least=0)  # also so many seconds after the one before; 0: by steps alone
    keep_last: int = ranged(2, least=1)
    keep_every: int = ranged(0, least=0)  # also keep each checkpoint whose step is a multiple; 0: none
    # Also keep so many with the lowest held-out loss (eval/loss), which are saved when they are evaluated.
    keep_best: int = since(0, before=0, least=0)
