"""Learning-rate schedules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.optim.config import ScheduleConfig


def phases(config: ScheduleConfig, steps: int) -> tuple[int, int]:
    """(warm-up steps, decay steps) of a run of `steps`; where it is too short for both, the warm-up is shortened."""
    decay = round(config.decay_fraction * steps) if config.kind == "trapezoid" else 0
    return max(0, min(config.warmup_steps, steps - decay)), decay


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> Callable[[Any], Any]:
    """The learning rate f32[] after t steps of a run of `steps`, for t i32[], or for an int without any device.

    Step t + 1, the one that has this rate, has the number n = t + 1, or with count_from=zero n = t:

    trapezoid  n/w below w; the peak until steps - D; then to `floor` at n = steps, linear (MoR paper, appendix on
               set-up) or as 1 - sqrt(progress)
    cosine     n/w below w; then half a cosine to `floor`
    """
    warmup, decay = phases(config, steps)
    first = 1 if config.count_from == "one" else 0

    def schedule(t: Any) -> Any:
        xp: Any = jnp if isinstance(t, jax.Array) else np
        n = xp.asarray(t + first, xp.float32)
        fall: Any
        rise = xp.minimum(1.0, n / warmup) if warmup else 1.0
        match config.kind:
            case "constant":
                fall = 1.0
            case "cosine":
                progress = xp.clip((n - warmup) / max(1, steps - warmup), 0.0, 1.0)
                fall = config.floor + (1 - config.floor) * 0.5 * (1 + xp.cos(xp.pi * progress))
            case "trapezoid":
                progress = xp.clip((n - (steps - decay)) / max(1, decay), 0.0, 1.0)
                shape = xp.sqrt(progress) if config.decay_shape == "sqrt" else progress
                fall = 1.0 - (1.0 - config.floor) * shape
        return xp.asarray(peak * rise * fall, xp.float32)

    return schedule
