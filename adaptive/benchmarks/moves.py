"""Other settings of a compiled step, by estimate: which would fit a device, and how long they would take.

From one compiled step, or from what its compiler says that it would have needed: the state and what the loss holds
stay, the rest grows with the rows that a device computes at once, and with what the backward pass keeps. Shares of the
latter are those of the compiled programs in docs/kernels.md.
"""

import dataclasses
from typing import Any, NamedTuple

from adaptive.account import parameters
from adaptive.benchmarks.estimate import estimate
from adaptive.parallel.mesh import axis_sizes
from adaptive.recipe import Recipe
from adaptive.settings import divisors
from adaptive.targets import TARGETS, Topology
from adaptive.training.config import POLICIES, Remat

KEPT: dict[Remat, float] = {"none": 1.0, "attention": 0.6, "dots": 0.55, "layer": 0.1}
SPARE = 0.05  # of the memory, as train.remat=auto leaves it


class Move(NamedTuple):
    """Settings beside those of a compiled step, the bytes of a device that they would need, and the seconds of a step
    with the least that has to be exchanged, none of it hidden."""

    settings: tuple[str, ...]
    needs: float
    seconds: float


def moves(record: dict[str, Any], recipe: Recipe, topology: Topology) -> list[Move]:
    """Every other `train.remat` and `train.device_batch_size` of this step, and more devices to share a state that
    takes much; the fastest first. None where the compiler did not tell what the step needs."""
    needs = record["needs"]
    if needs is None or topology.target == "cpu":
        return []
    sizes = axis_sizes(recipe.mesh, topology.devices)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    all_rows = recipe.train.batch_size // shards
    rows = all_rows // record["accumulation"]
    state = record.get("arguments") or _state(recipe, sizes)
    stays = min(needs, 4 / 3 * state + _loss(recipe, sizes))
    grows = (needs - stays) / KEPT[record["remat"]] / rows
    exchanged = sum(part["bytes"] for part in record["least"]) / TARGETS[topology.target].inside
    found = []
    for remat in POLICIES:
        for some in divisors(all_rows):
            given = (f"train.remat={remat}", f"train.device_batch_size={some}")
            if (remat, some) != (record["remat"], rows):
                # Parameters are gathered for every micro-batch.
                seconds = estimate(_with(recipe, remat, some), topology.target, topology.devices).step
                found.append(Move(given, stays + grows * KEPT[remat] * some, seconds + exchanged * rows / some))
    for parts in _finer(recipe, sizes):
        less = state * 4 / 3 * (1 - sizes["fsdp"] / parts)
        given = (f"mesh.fsdp={parts}", f"mesh.data={shards // (parts * sizes['expert'])}")
        seconds = estimate(recipe, topology.target, topology.devices).step
        found.append(Move(given, needs - less, seconds + exchanged))
    return sorted(found, key=lambda move: (move.seconds, move.needs))


def that_fit(found: list[Move], topology: Topology, most: int = 4) -> list[Move]:
    """The fastest that would fit, of each kind of change and number of rows the best."""
    room = TARGETS[topology.target].memory * (1 - SPARE)
    fitting = [move for move in found if move.needs <= room]
    best: dict[str, Move] = {}
    for move in sorted(fitting, key=lambda move: (move.seconds, -_rows(move))):
        best.setdefault(move.settings[0], move)
    return list(best.values())[:most]


def _rows(move: Move) -> int:
    return max((int(given.partition("=")[2]) for given in move.settings if "batch_size" in given), default=0)


def _with(recipe: Recipe, remat: Remat, rows: int) -> Recipe:
    return dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, remat=remat, device_batch_size=rows)
    )  # fmt: skip


def _state(recipe: Recipe, sizes: dict[str, int]) -> float:
    """Bytes of parameters and AdamW's moments, float32, on a device."""
    return 12 * parameters(recipe.model).total / (sizes["fsdp"] * sizes["expert"] * sizes["tensor"])


def _loss(recipe: Recipe, sizes: dict[str, int]) -> float:
    """Bytes of the output matrix as the loss holds it: three times in float32."""
    return 12 * recipe.model.vocab_size * recipe.model.width / sizes["tensor"]


def _finer(recipe: Recipe, sizes: dict[str, int]) -> list[int]:
    """Sizes above that of mesh.fsdp which divide every width and the devices that now hold copies."""
    widths = recipe.model.body.widths(recipe.model.width)
    all_ = sizes["fsdp"] * sizes["data"]
    return [n for n in divisors(all_) if n > sizes["fsdp"] and all(w % n == 0 for w in (*widths, recipe.model.width))]
