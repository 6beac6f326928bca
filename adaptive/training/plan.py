"""What is about to happen: printed before the first step, and kept as plan.json."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from adaptive import versions
from adaptive.optim.schedule import make_schedule, phases
from adaptive.peaks import peak_of
from adaptive.recipe import Recipe
from adaptive.training import replicated, unread
from adaptive.training.fitting import Fitted
from adaptive.training.metrics import StepCost
from adaptive.training.program import Program
from adaptive.training.report.collect import plan_costs
from adaptive.training.report.schema import PlanRecord
from kernels_pallas.choice import Kernels


def make_plan(program: Program, text: tuple[np.ndarray, np.ndarray] | None = None) -> PlanRecord:
    """The plan of a run before anything is compiled.

    text  for the bytes per token: i32[vocab] bytes of each, and token ids of real text; None: not known
    """
    recipe, device = program.recipe, jax.devices()[0]
    peak = peak_of(device.device_kind, str(program.dtype)).flops
    sizes = text[0][text[1]] if text else np.zeros(0)
    return PlanRecord(
        name=recipe.name,
        steps=recipe.train.steps,
        bytes_per_token=float(sizes.mean()) if sizes.size else 0.0,
        device_kind=device.device_kind,
        devices=program.mesh.size,
        processes=jax.process_count(),
        mesh=dict(program.mesh.shape),
        compute_dtype=str(program.dtype),
        peak_flops_per_s=None if peak is None else peak * program.mesh.size,
        kernels={name: runs_on(name, device.platform, recipe.train.kernels) for name in program.facts.kernels},
        cache={one.policy: one.bytes for one in program.kept},
        inexact=tuple(one.policy for one in program.kept if not one.exact),
        versions=versions.in_use(),
        **plan_costs(recipe.model, recipe.data.seq_len, recipe.train.batch_size, program.remat, recipe.objective),
    )


def runs_on(operation: str, platform: str, kernels: Kernels = "auto") -> str:
    """What computes an operation on a platform, and why: its own package says."""
    if kernels == "reference":
        return "XLA alone: train.kernels=reference"
    room = "adaptive" if operation == "routing" else "kernels_pallas"
    return importlib.import_module(f"{room}.{operation}").runs_on(platform)


def with_compiled(plan: PlanRecord, fitted: Fitted) -> PlanRecord:
    """The plan with what is known of the compiled step, and what was chosen to be recomputed for it to fit."""
    compiled, program = fitted.steps.first, fitted.program
    recipe = program.recipe
    costs = plan_costs(recipe.model, recipe.data.seq_len, recipe.train.batch_size, program.remat, recipe.objective)
    return dataclasses.replace(
        plan, compile_seconds=round(compiled.seconds, 2), memory=compiled.memory(), remat=fitted.why, **costs
    )


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
    recipe, facts = program.recipe, program.facts
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "data=1"
    body = plan.unique_parameters - plan.embedding_parameters
    lines = [
        f"model     {plan.family}, {_count(plan.unique_parameters)} parameters ({_count(body)} without embeddings); "
        f"{plan.unique_layers} unique layers act as {plan.effective_layers}",
    ]
    if plan.capacities:
        shares = ", ".join(map(str, plan.capacities))
        lines.append(f"routing   {facts.depth}, {plan.recursions} recursions over {shares} of {plan.seq_len}")
    lines += _chunk_lines(facts.chunking, plan.seq_len)
    lines += [f"experts   {described}" for described in program.experts_described]
    lines += [f"          {line}" for line in program.expert_lines]
    if recipe.objective.kind() != "next_token":
        lines.append(f"objective {recipe.objective.kind().replace('_', ' ')}")
    lines += [
        f"mesh      {mesh} on {plan.devices} x {plan.device_kind}, {plan.compute_dtype}"
        + (f", {program.accumulation} micro-batches" if program.accumulation > 1 else ""),
        *(f"pipeline  {line}" for line in program.pipeline_lines),
        *_accumulated(program),
        f"training  {plan.steps:,} steps of {recipe.train.batch_size} x {plan.seq_len} = "
        f"{_count(plan.steps * plan.tokens_per_step)} tokens; {_schedule(recipe)}",
        f"compute   {plan.flops_per_step * plan.steps:.3g} FLOPs in all, {plan.flops_per_step:.3g} a step: "
        f"{plan.flops_per_step / plan.dense_flops_per_step:.0%} of what it would be with every token at full depth",
        *(f"kernels   {operation}: {choice}" for operation, choice in plan.kernels.items()),
    ]
    if plan.cache:
        lines += _kept(plan)
    if program.recipe.init.run:
        lines.append(f"begins    from {program.recipe.init.run} at step {program.recipe.init.step}")
    if program.frozen is not None:
        flags = jax.tree.leaves(program.frozen)
        lines.append(f"frozen    {sum(flags)} of {len(flags)} parameter arrays")
    lines += [f"note      {line}" for line in (*unread.lines_of(program), *replicated.lines_of(program))]
    if plan.peak_flops_per_s is None:
        lines.append(f"MFU       not shown: {peak_of(plan.device_kind, plan.compute_dtype).why}")
    return lines


def _accumulated(program: Program) -> list[str]:
    """How auxiliary losses are formed where there are several micro-batches and such losses."""
    if program.accumulation == 1 or not (names := program.auxiliary()):
        return []
    if program.recipe.train.auxiliary_over == "micro_batch":
        return [
            f"          {', '.join(names)}: of each micro-batch, so train.device_batch_size changes what is minimised"
        ]
    return [
        f"          {', '.join(names)}: of the whole batch, known by one more forward pass "
        "(train.auxiliary_over=micro_batch saves it)"
    ]


def _chunk_lines(chunking: Sequence[tuple[str, Any]], seq_len: int) -> list[str]:
    """One line per chunking stage: what decides, and its slots, which may change at steps of the schedule, its own or
    that of a stage around it."""
    lines, positions = [], {0: seq_len}
    for stage, (_, settings) in enumerate(chunking):
        steps = sorted({*positions, *settings.capacity_steps})
        before = {step: positions[max(begin for begin in positions if begin <= step)] for step in steps}
        slots = {step: max(at for at in settings.slots(n) if at[0] <= step)[1] for step, n in before.items()}
        chunker = settings.chunker
        aim = f" of about {chunker.expected():g}" if chunker.expected() > 1 else ""
        room = ", ".join(f"{slots[step]} of {before[step]}" + (f" from step {step}" if step else "") for step in steps)
        lines.append(f"chunks    stage {stage}: {chunker.kind()}{aim}; room for {room}")
        positions = slots
    return lines


def memory_line(memory: Mapping[str, int]) -> str:
    return "memory    " + (
        ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in memory.items()) or "not told by the backend"
    )


def _kept(plan: PlanRecord) -> list[str]:
    """What generation keeps of a token, by policy."""
    (name, size), *others = plan.cache.items()
    first = f"cache     {size:,.0f} bytes a token in generation"
    lines = [first + (f" ({name}{', inexact' * (name in plan.inexact)})" if name else "")]
    told = lambda some: ", ".join(f"{name} {size:,.0f}" for name, size in some)  # noqa: E731
    if exact := told(one for one in others if one[0] not in plan.inexact):
        lines.append(f"          exact as well: {exact}")
    if inexact := told(one for one in others if one[0] in plan.inexact):
        lines.append(f"          inexact: {inexact}")
    return lines


def _schedule(recipe: Recipe) -> str:
    s, steps = recipe.schedule, recipe.train.steps
    warmup, decay = phases(s, steps)
    cut = f" (shortened from {s.warmup_steps})" if warmup < s.warmup_steps else ""
    end = f", decay over the last {decay}" if s.kind == "trapezoid" else ""
    rate = make_schedule(s, recipe.optimizer.learning_rate, steps)
    ends = f"rate {rate(0):.3g} in the first step, {rate(steps - 1):.3g} in the last"
    return f"peak rate {recipe.optimizer.learning_rate:g}, {s.kind}, warm-up {warmup}{cut}{end}; {ends}"


def _count(n: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"
