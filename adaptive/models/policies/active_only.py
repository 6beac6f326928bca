"""The cache of a pass has slots for the positions that take it alone, and holds them without gaps (MoR paper, section
2.3: recursion-wise caching)."""

import dataclasses
import math
from typing import Any

from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models.policies import Policy
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(Policy):
    """Exact. Pass r has slots for its share of the positions, as in training, and for `slack` of all of them more.

    A position that finds none is counted, and the row's results are NaN from that pass on, never wrong: who generates
    makes room in time (`adaptive.models.kept.with_room`).
    """

    slack: float = ranged(0.1, least=0, most=1)

    def refuse(self, recursive: Any) -> str:
        depth = recursive.depth
        if depth.equal_passes:
            return "every token takes every pass, so there is nothing to leave out"
        if recursive.keys_values != "per_recursion":
            return f"keys_values={recursive.keys_values}: later passes read what the first kept of all positions"
        if not depth.capped:
            return f"depth={depth.kind()} runs its passes as one loop, whose caches are alike"
        if not any(isinstance(b.mixer, Attention) for b in recursive.core.blocks):
            return "nothing in the core attends, so no pass keeps anything of single positions"
        return ""

    def slots(self, recursive: Any, slots: int) -> tuple[int, ...] | None:
        shares = recursive.depth.paper_fractions(recursive.recursions)
        return tuple(max(1, min(slots, math.ceil((share + self.slack) * slots))) for share in shares)
