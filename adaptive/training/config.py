"""The training loop and what it keeps: plain data."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    batch_size: int = 8  # sequences per optimizer step, over all devices
    device_batch_size: int = 0  # most sequences a device computes at once; 0: no accumulation
    seed: int = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    remat: Literal["none", "layer", "dots"] = "none"  # recompute in the backward pass: nothing, layers, all but matmuls
    loss_chunk: int = 0  # positions whose logits exist at once, per sequence; 0: chosen from the vocabulary
    max_bad_steps: int = 5  # consecutive non-finite steps after which the run stops
    step_timeout_s: float = 1800.0  # a step that takes longer is reported with every thread's stack, and the run ends


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 100  # steps; 0: only at the end
    batches: int = 8  # held-out batches per evaluation; 0: all of them
    selection: tuple[str, ...] = ("topk", "threshold")  # how routed models choose: as trained, and causally


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between rows of metrics.jsonl
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if a key is present
    project: str = "adaptive"
    profile_start: int = 0  # first step of a jax.profiler trace
    profile_steps: int = 0  # how many steps to trace; 0: none
    sample_prompt: str = "The "
    sample_tokens: int = 200
