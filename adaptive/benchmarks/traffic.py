"""What devices exchange in a step: of a compiled program, and at least.

Bytes are those that one device receives, by algorithms that send nothing twice: a gather brings (n - 1) / n of the
whole array, a reduce-scatter the same, an all-reduce both, an all-to-all (n - 1) / n of what a device has. Over several
slices these run within each slice first, so that the slow network carries the part of one device alone.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from adaptive.account import account
from adaptive.benchmarks.compiled_text import Exchange
from adaptive.parallel.rules import split
from adaptive.targets import Target
from adaptive.training.program import Program


class Received(NamedTuple):
    """Bytes of a device, over links within its slice and over the network between slices."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Any) -> "Received":
        return Received(self.inside + other.inside, self.between + other.between)

    def seconds(self, target: Target) -> float:
        """With all links of a device at work all the time, and nothing else at the same time."""
        return self.inside / target.inside + self.between / target.between


def slices_of(mesh: Mesh, count: int) -> np.ndarray:
    """i64[devices]: the slice of each device, in the mesh's order; by their processes where they do not say."""
    flat = list(mesh.devices.flat)
    named = [getattr(device, "slice_index", None) for device in flat]
    if len({*named} - {None}) == count:
        return np.array(named)
    rank = {device: i for i, device in enumerate(sorted(flat, key=lambda d: (d.process_index, d.id)))}
    return np.array([rank[device] * count // len(flat) for device in flat])


def received(exchanges: Iterable[Exchange], slice_of: np.ndarray) -> dict[str, Received]:
    """By kind of collective, of one execution of a program."""
    found: dict[str, Received] = defaultdict(Received)
    for one in exchanges:
        found[one.kind] += _of(one, slice_of)
    return dict(sorted(found.items()))


def _of(one: Exchange, slice_of: np.ndarray) -> Received:
    if one.kind == "send":  # to the same device of another slice, which sends as much
        return Received(0.0, float(one.bytes * one.runs))
    groups, size = slice_of[one.groups], one.bytes * one.runs
    across = len(np.unique(groups[0]))
    if one.kind == "collective-permute":
        crossing = float((groups[:, 0] != groups[:, -1]).mean())
        return Received(size * (1 - crossing), size * crossing)
    within = groups.shape[1] // across
    twice = 2 if one.kind == "all-reduce" else 1
    if one.kind.endswith("all-to-all"):
        return Received(size * (within - 1) / groups.shape[1], size * (across - 1) / across)
    return Received(
        twice * size * (within - 1) / within,
        twice * size / within * (across - 1) / across,
    )


class Part(NamedTuple):
    """One reason for communication, its formula, and the bytes that a device receives in a step."""

    name: str
    formula: str
    bytes: float


def least(program: Program) -> list[Part]:
    """What no program can avoid that keeps parameters where this one does: they are gathered once for the forward and
    once for the backward pass, and gradients are scattered once, however many micro-batches and passes of a recursion a
    step has. `context`, `stage` and experts that see gathered tokens are not counted."""
    mesh, itemsize = program.mesh, program.dtype.itemsize
    over = split(mesh, program.rules.width)
    wide = small = replicas = 0.0
    for variable in jax.tree.leaves(program.abstract_state().params, is_leaf=lambda a: isinstance(a, nnx.Variable)):
        value, axes = variable.get_value(), variable.get_metadata().get("axes") or ()
        parts = {name: split(mesh, getattr(program.rules, name)) for name in axes if name}
        local = value.size / np.prod([1, *(n for name, n in parts.items() if name != "width")])
        shards = program.shards // (split(mesh, program.rules.experts) if "experts" in parts else 1)
        if "width" in parts:
            wide += local * itemsize * (over - 1) / over
            copies = max(1, shards // over)
            replicas += 2 * local / over * itemsize * (copies - 1) / copies
        else:
            small += 2 * local * 4 * (shards - 1) / shards
    found = [
        Part("gathers", f"2 x parameters x {itemsize} B x (n - 1) / n, n = {over}", 2 * wide),
        Part("scatters", f"gradients x {itemsize} B x (n - 1) / n, n = {over}", wide),
        Part("replicas", f"2 x share of gradients x {itemsize} B x (r - 1) / r over replicas", replicas),
        Part("norms, routers", "2 x gradients x 4 B x (b - 1) / b over the batch", small),
        Part("tensor", "all-reduces of activations behind mixers and feed-forwards and of their gradients, embedding "
             "and head once each: 2 x tokens x width x itemsize x (t - 1) / t", _tensor(program)),
        Part("experts", "4 x pairs of token and expert x width x itemsize x (e - 1) / e", _experts(program)),
    ]  # fmt: skip
    return [part for part in found if part.bytes]


def _tensor(program: Program) -> float:
    """Of activations between devices that split heads, hidden units and vocabulary."""
    recipe, parts = program.recipe, program.mesh.shape["tensor"]
    if parts == 1:
        return 0.0
    *stages, head = account(recipe.model, recipe.data.seq_len).stages
    widths = recipe.model.body.widths(recipe.model.width)
    times = sum(2 * s.tokens * s.layers * ((s.projections > 0) + (s.feed_forward > 0)) for s in stages)
    numbers = times * widths[-1] + 2 * head.tokens * recipe.model.width
    rows = recipe.train.batch_size / program.shards
    return rows * numbers * program.dtype.itemsize * 2 * (parts - 1) / parts


def _experts(program: Program) -> float:
    """Of tokens that travel to their experts and back, forward and backward."""
    parts = program.mesh.shape["expert"]
    if parts == 1 or program.experts.strategy != "expert":
        return 0.0
    recipe, found = program.recipe, program.facts.experts
    tokens = recipe.train.batch_size / program.shards * recipe.data.seq_len
    layers = sum(stage.layers * (stage.experts > 0) for stage in account(recipe.model, recipe.data.seq_len).stages)
    pairs = tokens * layers * found[0].settings.router.per_token()
    return 4 * pairs * recipe.model.width * program.dtype.itemsize * (parts - 1) / parts
