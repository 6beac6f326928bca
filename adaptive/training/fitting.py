"""What the backward pass recomputes, where it is left to be chosen: as little as fits the device."""

from typing import NamedTuple

import jax

from adaptive.errors import NoRoomError
from adaptive.parallel.cluster import anywhere
from adaptive.peaks import memory_of
from adaptive.training.config import POLICIES, Remat
from adaptive.training.program import Program, Steps, advice
from adaptive.training.saved import SavedSteps

SPARE = 0.05  # of the memory: for batches on their way and what evaluation keeps


class Tried(NamedTuple):
    """A policy, and the bytes of a device that its step needs; None where it does not fit and nobody tells."""

    remat: Remat
    needs: int | None

    def __str__(self) -> str:
        return f"{self.remat} needs {'more' if self.needs is None else gib(self.needs)}"


class Fitted(NamedTuple):
    """A program, its steps, of which the first is compiled, and why it recomputes what it does; no reason where the
    recipe says what to recompute."""

    program: Program
    steps: Steps
    why: str


def fitted(program: Program, saved: SavedSteps | None = None) -> Fitted:
    """With train.remat=auto the program that recomputes least of those whose first step fits a device: "none",
    "attention", "dots", "layer" are compiled in turn. Where the memory is not known, as on CPUs, nothing is recomputed.

    saved  steps of this program that were compiled before: nothing is, and they say what is recomputed

    Raises NoRoomError where no step fits.
    """
    if saved is not None:
        same = program if program.remat == saved.remat else Program(program.recipe, program.mesh, saved.remat)
        chosen = program.recipe.train.remat == "auto"
        return Fitted(same, Steps(same, saved), f"{saved.remat}: as it was compiled" if chosen else "")
    if program.recipe.train.remat != "auto":
        return Fitted(program, Steps(program), "")
    kind = program.mesh.devices.flat[0].device_kind
    limit = memory_limit(program)
    if limit is None:
        return Fitted(program, Steps(program), f"{program.remat}: how much memory a {kind} has is not known")
    room, tried = int(limit * (1 - SPARE)), list[Tried]()
    for remat in POLICIES:
        candidate = program if remat == program.remat else Program(program.recipe, program.mesh, remat)
        steps = _compiled(candidate)
        tried.append(Tried(remat, steps.first.needs() if steps else None))
        too_much = tried[-1].needs is None or tried[-1].needs > room
        if not anywhere(too_much) and steps is not None:
            taken, *others = map(str, reversed(tried))
            return Fitted(candidate, steps, "; ".join([f"{taken} of {gib(room)}", *reversed(others)]))
    raise NoRoomError(
        f"no train step fits the {gib(room)} of a {kind}, whatever is recomputed: {'; '.join(map(str, tried))}. "
        f"{advice(program)}"
    )


def _compiled(program: Program) -> Steps | None:
    """The program's steps, the first compiled; None where the compiler finds no room for it."""
    try:
        return Steps(program)
    except NoRoomError:
        return None


def memory_limit(program: Program) -> int | None:
    """Bytes of a device that programs can have, as the device itself says or its kind; None: not known."""
    mine = [d for d in program.mesh.devices.flat if d.process_index == jax.process_index()]
    device = (mine or list(program.mesh.devices.flat))[0]
    if device.platform == "cpu":
        return None
    try:
        told = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is described only, to compile for
        told = None
    return told or memory_of(device.device_kind)


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
