"""Settings that a run never reads: given on purpose, and without any effect.

A settings dataclass may have a method `unread`, which names the fields that mean nothing beside the others, with the
reasons, and `unread_under`, which does so of those that have a value but mean nothing to an objective. What depends on
the model and the mesh together is known here.
"""

import dataclasses
from collections.abc import Iterator

from adaptive import settings
from adaptive.parallel.rules import split
from adaptive.settings import show
from adaptive.training.program import Program


def lines_of(program: Program) -> list[str]:
    """One line for every setting with another value than its default that the run does not read."""
    found: dict[str, str] = {}
    objective = program.recipe.objective
    for at, node in settings.nodes(program.recipe, ""):
        found |= {f"{at}.{name}".strip("."): reason for name, reason in settings.without_effect(node).items()}
        under = node.unread_under(objective) if hasattr(node, "unread_under") else {}
        found |= {f"{at}.{name}".strip("."): reason for name, reason in under.items()}
    for path, reason in _of_run(program):
        group, _, name = path.rpartition(".")
        node = program.recipe
        for part in group.split("."):
            node = getattr(node, part)
        if settings.is_given(node, name):
            found[path] = reason
    values = settings.leaf_values(program.recipe)
    return [f"{path}={show(values[path])} has no effect: {reason}" for path, reason in found.items()]


def _of_run(program: Program) -> Iterator[tuple[str, str]]:
    recipe, experts = program.recipe, program.facts.experts
    log, steps = recipe.log, recipe.train.steps
    if log.profile_steps and log.profile_start >= steps:
        yield "log.profile_steps", f"the trace would begin after step {log.profile_start}, the run has {steps}"
    if len(program.selections) == 1:
        yield "eval.selection", "this model selects alike as it trains and as it generates"
    if not recipe.objective.noisy:
        yield "eval.draws", f"objective={recipe.objective.kind()} has no noise"
    if program.refuse_generation and recipe.objective.denoising() is None:
        yield "log.sample_tokens", "this model writes no sample"
    if program.accumulation == 1:
        yield "train.device_batch_size", "no device has more rows of a batch than that"
        yield "train.auxiliary_over", "there is one micro-batch"
    elif recipe.train.auxiliary_over != "batch" and not program.auxiliary():
        yield "train.auxiliary_over", "this model trains no auxiliary loss"
    if program.pipeline is None:
        one_stage = program.mesh.shape["stage"] == 1
        yield "mesh.stage_groups", "mesh.stage=1" if one_stage else "every stage has one part of this model's layers"
    over = recipe.mesh.expert_parallel.axes
    if not experts or split(program.mesh, over) == 1:
        sizes = " ".join(f"mesh.{axis}=1" for axis in over)
        why = "the model has no experts" if not experts else f"{sizes}, so that experts are on every device"
        for field in dataclasses.fields(recipe.mesh.expert_parallel):
            yield f"mesh.expert_parallel.{field.name}", why
