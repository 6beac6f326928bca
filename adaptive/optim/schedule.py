"""Learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from adaptive.optim.config import ScheduleConfig


def phases(config: ScheduleConfig, steps: int) -> tuple[int, int]:
    """(warm-up steps, decay steps) of a run of `steps`; where it is too short for both, the warm-up is shortened."""
    decay = round(config.decay_fraction * steps) if config.kind == "trapezoid" else 0
    return max(0, min(config.warmup_steps, steps - decay)), decay


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate f32[] at step t (from 0) of a run of `steps` steps; at t = 0 a warmed-up schedule is 0.

    trapezoid  t/w below w; the peak until steps - D; then to `floor` at `steps`, linear (MoR paper, appendix on set-up)
               or as 1 - sqrt(progress)
    cosine     t/w below w; then half a cosine to `floor`
    """
    warmup, decay = phases(config, steps)

    def schedule(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.float32)
        fall: jax.Array | float
        rise = jnp.minimum(1.0, t / warmup) if warmup else 1.0
        match config.kind:
            case "constant":
                fall = 1.0
            case "cosine":
                progress = jnp.clip((t - warmup) / max(1, steps - warmup), 0.0, 1.0)
                fall = config.floor + (1 - config.floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case "trapezoid":
                progress = jnp.clip((t - (steps - decay)) / max(1, decay), 0.0, 1.0)
                shape = jnp.sqrt(progress) if config.decay_shape == "sqrt" else progress
                fall = 1.0 - (1.0 - config.floor) * shape
        return jnp.asarray(peak * rise * fall, jnp.float32)

    return schedule
