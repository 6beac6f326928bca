"""What is about to happen: printed before the first step, and kept as plan.json."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from adaptive import doctor
from adaptive.optim.schedule import phases
from adaptive.peaks import peak_of
from adaptive.recipe import Recipe
from adaptive.training.metrics import StepCost
from adaptive.training.program import Compiled, Program
from adaptive.training.report.collect import plan_costs
from adaptive.training.report.schema import PlanRecord
from kernels_pallas import attention


def make_plan(program: Program, byte_lengths: np.ndarray, sample: np.ndarray) -> PlanRecord:
    """The plan of a run before anything is compiled.

    byte_lengths  i32[vocab] bytes of text per token; sample: token ids of real text, for the mean
    """
    recipe, device = program.recipe, jax.devices()[0]
    peak = peak_of(device.device_kind, str(program.dtype)).flops
    text = byte_lengths[sample]
    versions = dict(part.rsplit(" ", 1) for part in doctor.check_versions().splitlines()[0].split(", "))
    return PlanRecord(
        name=recipe.name,
        steps=recipe.train.steps,
        bytes_per_token=float(text.mean()) if text.size else 0.0,
        device_kind=device.device_kind,
        devices=program.mesh.size,
        processes=jax.process_count(),
        mesh=dict(program.mesh.shape),
        compute_dtype=str(program.dtype),
        peak_flops_per_s=None if peak is None else peak * program.mesh.size,
        kernels={"attention": attention.IMPLEMENTATION, "gather, scatter, top-k": "XLA"},
        versions=versions,
        **plan_costs(recipe.model, recipe.data.seq_len, recipe.train.batch_size, recipe.train.remat),
    )


def with_compiled(plan: PlanRecord, compiled: Compiled) -> PlanRecord:
    return dataclasses.replace(plan, compile_seconds=round(compiled.seconds, 2), memory=compiled.memory())


def cost_of(plan: PlanRecord) -> StepCost:
    return StepCost(
        plan.tokens_per_step,
        plan.flops_per_step,
        plan.dense_flops_per_step,
        plan.bytes_per_token,
        plan.peak_flops_per_s,
    )


def plan_lines(plan: PlanRecord, program: Program) -> list[str]:
    """What a user should know before the wait for the compiler."""
    recipe = program.recipe
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    body = plan.unique_parameters - plan.embedding_parameters
    lines = [
        f"model     {plan.family}, {_count(plan.unique_parameters)} parameters ({_count(body)} without embeddings); "
        f"{plan.unique_layers} unique layers act as {plan.effective_layers}",
    ]
    if plan.capacities:
        shares = ", ".join(map(str, plan.capacities))
        lines.append(
            f"routing   {recipe.model.router.kind}, {plan.recursions} recursions over {shares} of {plan.seq_len}"
        )
    lines += _chunk_lines(recipe)
    if program.experts_described:
        lines.append(f"experts   {program.experts_described}")
        lines += [f"          {line}" for line in program.expert_lines]
    lines += [
        f"mesh      {mesh} on {plan.devices} x {plan.device_kind}, {plan.compute_dtype}"
        + (f", {program.accumulation} micro-batches" if program.accumulation > 1 else ""),
        f"training  {plan.steps:,} steps of {recipe.train.batch_size} x {plan.seq_len} = "
        f"{_count(plan.steps * plan.tokens_per_step)} tokens; {_schedule(recipe)}",
        f"compute   {plan.flops_per_step * plan.steps:.3g} FLOPs in all, {plan.flops_per_step:.3g} a step: "
        f"{plan.flops_per_step / plan.dense_flops_per_step:.0%} of what it would be with every token at full depth",
        "kernels   " + "; ".join(f"{op}: {choice}" for op, choice in plan.kernels.items()),
    ]
    if plan.peak_flops_per_s is None:
        lines.append(f"MFU       not shown: {peak_of(plan.device_kind, plan.compute_dtype).why}")
    return lines


def _chunk_lines(recipe: Recipe) -> list[str]:
    """One line per chunking stage of an H-Net: what decides, and the slots of every phase of the capacities."""
    hnet, lines = recipe.model.hnet, []
    phases = [hnet.at_phase(i) for i in range(len(hnet.capacity_steps) + 1)]
    positions = [recipe.data.seq_len] * len(phases)
    for stage in range(hnet.stages):
        slots = [phase.capacity(stage, n) for phase, n in zip(phases, positions, strict=True)]
        aim = f" of about {hnet.target(stage):g}" if hnet.learned(stage) else ""
        room = ", ".join(
            f"{slot} of {n}" + (f" from step {hnet.capacity_steps[i - 1]}" if i else "")
            for i, (slot, n) in enumerate(zip(slots, positions, strict=True))
        )
        lines.append(f"chunks    stage {stage}: {hnet.chunker(stage)}{aim}; room for {room}")
        positions = slots
    return lines


def memory_line(memory: Mapping[str, int]) -> str:
    return "memory    " + (
        ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in memory.items()) or "not told by the backend"
    )


def _schedule(recipe: Recipe) -> str:
    s, steps = recipe.schedule, recipe.train.steps
    warmup, decay = phases(s, steps)
    cut = f" (shortened from {s.warmup_steps})" if warmup < s.warmup_steps else ""
    end = f", decay over the last {decay}" if s.kind == "trapezoid" else ""
    return f"peak rate {recipe.optimizer.learning_rate:g}, {s.kind}, warm-up {warmup}{cut}{end}"


def _count(n: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"
