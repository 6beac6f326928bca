"""Which way of computing experts on a mesh costs least: bytes sent, and waiting for the busiest device. No jax."""

import dataclasses
from typing import get_args

from adaptive.parallel.config import ExpertParallel, Strategy

# FLOPs that a device computes while it sends one byte: 197 TFLOP/s over 200 GB/s on a TPU v5e, 989 over 450 within a
# node of H100s. It only weighs waiting against sending.
FLOPS_PER_BYTE = 1000.0
MOST_GATHERED = 2**31  # bytes of one layer's experts that a device may hold whole


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """One layer's experts on one device of the mesh, in one forward pass.

    tokens      of a device (a micro-batch)
    pairs       of a token and an expert, of a device's tokens, that are computed
    rows        that are sent for them: the pairs, or slots padded to a capacity
    devices     on the expert axis; `tensor` devices share the hidden units of each expert
    matrices    [width, hidden] of each expert: 3 where gated, else 2
    itemsize    bytes of an element in compute
    imbalance   pairs of the busiest device over the mean, where experts are split over devices
    """

    tokens: int
    pairs: float
    rows: float
    experts: int
    width: int
    hidden: int
    devices: int
    tensor: int = 1
    matrices: int = 3
    itemsize: int = 2
    imbalance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """sent     bytes that a device sends in a forward pass of a layer; the backward pass sends them again
    waited   FLOPs that the busiest device computes beyond the mean
    refused  why the strategy cannot be used; empty where it can
    """

    sent: float
    waited: float
    refused: str = ""

    @property
    def total(self) -> float:
        """In bytes sent."""
        return self.sent + self.waited / FLOPS_PER_BYTE


def cost(strategy: Strategy, load: ExpertLoad, settings: ExpertParallel) -> Cost:
    """What a strategy costs. Routing sent along is 8 bytes a row (a token's number and its weight)."""
    d, hidden = load.devices, load.hidden / load.tensor
    flops = 2.0 * load.matrices * load.pairs * load.width * hidden
    waited = flops * (load.imbalance - 1) if d > 1 else 0.0
    seen = (d - 1) * (2.0 * load.tokens * load.width * load.itemsize + 8.0 * load.rows)
    split = "" if load.experts % d == 0 else f"{d} devices do not divide {load.experts} experts"
    match strategy:
        case "expert":
            share = (d - 1) / d
            if settings.exchange == "hierarchical":
                nodes, local = settings.nodes, d / settings.nodes
                share = (nodes - 1) / nodes + (local - 1) / local
            return Cost(2.0 * load.rows * load.width * load.itemsize * share, waited, split)
        case "gather":
            return Cost(seen, waited, split)
        case "tensor":
            parts = d * load.tensor
            fits = load.hidden % parts == 0
            return Cost(seen, 0.0, "" if fits else f"{parts} devices do not divide {load.hidden} hidden units")
        case "data":
            whole = load.matrices * load.experts * load.width * hidden * load.itemsize
            large = f"a layer's experts are {show_bytes(whole)}, above {show_bytes(MOST_GATHERED)}"
            return Cost(whole * (d - 1) / d, 0.0, split or (large if whole > MOST_GATHERED and d > 1 else ""))


def settle(settings: ExpertParallel, load: ExpertLoad | None) -> tuple[ExpertParallel, list[str]]:
    """The settings with a strategy in the place of "auto", the cheapest, and the reasons, a line for each strategy.

    Earlier of equals: expert, gather, data, tensor. Where none can be used it is expert, which `validate` then refuses.
    load None: of a model without experts, which has no reasons.
    """
    if load is None:
        strategy = "expert" if settings.strategy == "auto" else settings.strategy
        return dataclasses.replace(settings, strategy=strategy), []
    costs = {name: cost(name, load, settings) for name in get_args(Strategy)}
    usable = [name for name, c in costs.items() if not c.refused] or ["expert"]
    cheapest = min(usable, key=lambda name: costs[name].total)
    chosen = cheapest if settings.strategy == "auto" else settings.strategy
    if load.devices == 1:
        return dataclasses.replace(settings, strategy=chosen), ["experts on one device: nothing is sent"]
    why = "the cheapest" if settings.strategy == "auto" else "as the recipe says"
    mark = {chosen: "" if costs[chosen].refused else f" <- {why}"}
    lines = [f"{name:7}{_line(c)}{mark.get(name, '')}" for name, c in costs.items()]
    return dataclasses.replace(settings, strategy=chosen), lines


def _line(c: Cost) -> str:
    if c.refused:
        return f"not possible: {c.refused}"
    waits = f", and waits for the busiest device {c.waited:.3g} FLOPs" if c.waited else ""
    return f"sends {show_bytes(c.sent)} a layer and device{waits}"


def show_bytes(n: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"
