"""Optimizer and learning-rate schedule: plain data."""

import dataclasses
from typing import Literal

from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping; matrices are decayed, embeddings and routers among them (MoR release)."""

    learning_rate: float = ranged(3e-3, above=0)  # peak
    beta1: float = ranged(0.9, least=0, below=1)
    beta2: float = ranged(0.95, least=0, below=1)
    eps: float = ranged(1e-8, above=0)
    weight_decay: float = ranged(0.1, least=0)
    clip_norm: float = ranged(1.0, above=0)
    decay: Literal["matrices", "official"] = "matrices"  # official: all but what the H-Net release leaves out of decay


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps, as a multiple of the peak.

    trapezoid (warm-up, stable, decay): linear from 0 over `warmup_steps`, flat, then to `floor` over the last
    `decay_fraction` of the run, as `decay_shape` says. cosine: the same warm-up, then half a cosine to `floor`.
    A run shorter than warm-up plus decay shortens the warm-up to what is left.
    """

    kind: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    warmup_steps: int = ranged(0, least=0)
    decay_fraction: float = ranged(0.2, least=0, most=1)
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of the trapezoid; sqrt: 1 - sqrt(progress), steep at first
    floor: float = ranged(0.0, least=0, most=1)  # fraction of the peak at the end
