"""Dashboards beside metrics.jsonl: Weights & Biases and TensorBoard, each when asked for. Nothing in a run waits for
them, and nothing of a run depends on them."""

from adaptive.training.config import LogConfig
from adaptive.training.tracking import tensorboard, weights_and_biases
from adaptive.training.tracking.base import About, Say, Several, Tracker

__all__ = ["About", "Several", "Tracker", "start_tracking"]


def start_tracking(log: LogConfig, about: About, say: Say) -> Tracker:
    """Begins to track this start of a run where `log` asks; returns at once."""
    found: list[Tracker | None] = [weights_and_biases.start(log.wandb, log.project, about, say)]
    if log.tensorboard:
        found.append(tensorboard.start(about, say))
    return Several([one for one in found if one is not None])
