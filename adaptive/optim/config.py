"""Learning-rate schedule: plain data."""

import dataclasses
from typing import Literal

from adaptive.settings import ranged, since


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a multiple of the peak.

    trapezoid (warm-up, stable, decay): linear over `warmup_steps`, flat, then to `floor` over the last `decay_fraction`
    of the run, as `decay_shape` says. cosine: the same warm-up, then half a cosine to `floor`. A run shorter than
    warm-up plus decay shortens the warm-up to what is left.
    """

    kind: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    warmup_steps: int = ranged(0, least=0)
    decay_fraction: float = ranged(0.2, least=0, most=1)
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of the trapezoid; sqrt: 1 - sqrt(progress), steep at first
    floor: float = ranged(0.0, least=0, most=1)  # fraction of the peak at the end
    # Number of the first step. one: it trains, and the last has the floor. zero, as in the release of MoR: a warm-up
    # begins at rate 0, and the last step is one short of the floor.
    count_from: Literal["one", "zero"] = since("one", before="zero")

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        if self.kind == "trapezoid":
            return {}
        names = (
            ("decay_fraction", "decay_shape", "floor") if self.kind == "constant" else ("decay_fraction", "decay_shape")
        )
        return dict.fromkeys(names, f"schedule.kind={self.kind} has no such decay")
