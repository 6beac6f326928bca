"""The training loop and what it keeps: plain data."""

import dataclasses
from typing import Literal

from adaptive.errors import RecipeError
from adaptive.settings import divisors, ranged, show, since
from kernels_pallas.choice import Kernels

SELECTIONS = ("topk", "threshold")
Remat = Literal["none", "attention", "dots", "layer"]
POLICIES: tuple[Remat, ...] = ("none", "attention", "dots", "layer")  # from what recomputes nothing to what keeps least
AuxiliaryOver = Literal["batch", "micro_batch"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, on how much, and how a step is computed."""

    steps: int = ranged(100, least=1, most=2**31 - 1)
    batch_size: int = ranged(8, least=1, most=2**31 - 1)  # sequences per optimizer step, over all devices
    device_batch_size: int = ranged(0, least=0)  # most sequences a device computes at once; 0: no accumulation
    # Over what auxiliary losses are formed, where a device computes its rows in several micro-batches. A balancing loss
    # is a product of means, so "batch" goes over all micro-batches forward once more, to know the means of the others;
    # with "micro_batch", which needs no second pass, train.device_batch_size changes what is minimised.
    auxiliary_over: AuxiliaryOver = since("batch", before="micro_batch")
    # Parameters that are not trained: paths such as embedding, body/core/*, or what they begin with.
    frozen: tuple[str, ...] = since((), before=[])
    # Decay of a running average of the parameters, which is kept and evaluated beside them; 0: none. At step t it is at
    # most (1 + t) / (10 + t), so that the average forgets its start.
    ema: float = dataclasses.field(default=0.0, metadata={**ranged(0.0, least=0, below=1).metadata, "before": 0.0})
    seed: int = ranged(0, least=0, most=2**32 - 1)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    # Recompute in the backward pass: nothing, all but matmuls and attention, all but matmuls, layers, or the least of
    # these that fits the device.
    remat: Literal["auto", "none", "attention", "dots", "layer"] = "none"
    # Operations have kernels where the machine has some; "reference": none, XLA computes all, to compare with.
    kernels: Kernels = since("auto", before="auto")
    # Positions whose logits exist at once, per sequence; 0: chosen from the vocabulary and the device.
    loss_chunk: int = ranged(0, least=0)
    max_bad_steps: int = ranged(5, least=1)  # consecutive non-finite steps after which the run stops
    # What takes longer is reported with every thread's stack, and the run ends with 124: compiling, and restoring or
    # drawing parameters; a step, or an evaluation; saving the last checkpoint, and all that follows it.
    start_timeout_s: float = since(14400.0, before=14400.0, above=0)
    step_timeout_s: float = ranged(1800.0, above=0)
    shutdown_timeout_s: float = since(1500.0, before=1500.0, above=0)
    # Every so many steps one is computed twice from the same state; the run ends with 4 unless all bits agree. 0: none.
    repeat_every: int = since(0, before=0, least=0)

    def validate(self, seq_len: int) -> None:
        """Raises RecipeError for settings that do not fit rows of this length."""
        if self.loss_chunk and seq_len % self.loss_chunk:
            near = min(divisors(seq_len), key=lambda d: abs(d - self.loss_chunk))
            raise RecipeError(
                f"train.loss_chunk={self.loss_chunk} does not divide data.seq_len={seq_len}; nearest that does: "
                f"{near}; 0 chooses one"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and how models are evaluated."""

    every: int = ranged(100, least=0)  # steps; 0: only at the end
    rows: int = ranged(64, least=0)  # held-out rows per evaluation, the same whatever the batch size; 0: all of them
    draws: int = since(4, before=4, least=1)  # of the noise of each held-out row, of objectives whose loss has some
    selection: tuple[str, ...] = SELECTIONS  # how routed models choose: as trained, and causally
    # Sets that are scored besides what is held out, `rows` rows of each: as --data of `adaptive evaluate` names them.
    sets: tuple[str, ...] = since((), before=[])
    tasks: tuple[str, ...] = since((), before=[])  # files that are answered, as --tasks there names them

    def validate(self) -> None:
        """Raises RecipeError for an unknown way of choosing."""
        if not self.selection or not set(self.selection) <= set(SELECTIONS):
            raise RecipeError(f"eval.selection={show(self.selection)}: expected one or both of {', '.join(SELECTIONS)}")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is kept and shown of a run."""

    every: int = ranged(10, least=1)  # steps between rows of metrics.jsonl
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if a key is present
    project: str = "adaptive"
    tensorboard: bool = since(False, before=False)  # event files in the run's folder, of the same rows
    tags: tuple[str, ...] = since((), before=[])  # for dashboards, as are notes
    notes: str = since("", before="")
    profile_start: int = ranged(0, least=0)  # first step of a jax.profiler trace
    profile_steps: int = ranged(0, least=0)  # how many steps to trace; 0: none
    sample_prompt: str = "The "
    sample_tokens: int = ranged(200, least=0)

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        found = {}
        if not self.profile_steps:
            found["profile_start"] = "log.profile_steps=0 traces nothing"
        if self.wandb == "disabled":
            found["project"] = "log.wandb=disabled"
            if not self.tensorboard:
                found |= dict.fromkeys(("tags", "notes"), "log.wandb=disabled and log.tensorboard=false")
        if not self.sample_tokens:
            found["sample_prompt"] = "log.sample_tokens=0"
        return found
