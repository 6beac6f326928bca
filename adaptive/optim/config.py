"""Optimizer and learning-rate schedule: plain data."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping; matrices are decayed, embeddings and routers among them (MoR release)."""

    learning_rate: float = 3e-3  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    decay: Literal["matrices", "official"] = "matrices"  # official: all but what the H-Net release leaves out of decay
    stage_rates: tuple[float, ...] = ()  # of an H-Net: each stage's multiple of the learning rate, from the bytes in


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a multiple of the peak.

    trapezoid (warm-up, stable, decay): linear from 0 over `warmup_steps`, flat, then to `floor` over the last
    `decay_fraction` of the run, as `decay_shape` says. cosine: the same warm-up, then half a cosine to `floor`.
    A run shorter than warm-up plus decay shortens the warm-up to what is left.
    """

    kind: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of the trapezoid; sqrt: 1 - sqrt(progress), steep at first
    floor: float = 0.0  # fraction of the peak at the end
