"""What parts of a model cost, in matmul FLOPs of one sequence: plain numbers, which the parts' settings give and which
add up over the tree.

A matmul of [m, k] by [k, n] counts 2 m k n; nothing else counts (norms, softmax, rotary tables, gathers, the embedding
lookup).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """What a layer computes of one sequence; fractions are averages.

    queries   positions that it computes
    keys      positions that each of them is multiplied with where positions are compared
    row       positions of the whole row, over which the keys are spread evenly
    own_keys  whether the queries' own keys and values are projected
    """

    queries: float
    keys: float
    row: float
    own_keys: bool = True

    @staticmethod
    def whole(positions: float) -> "Span":
        """All positions of a row."""
        return Span(positions, positions, positions)


class Taken(NamedTuple):
    """Positions of one sequence that were computed, fractions allowed; None: the capacities of the settings.

    chunks  that each chunking stage passed on, from the outside in
    passes  that each recursion of the innermost body computed
    """

    chunks: Sequence[float] | None = None
    passes: Sequence[float] | None = None


CAPACITIES = Taken()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Forward matmul FLOPs of a part, or of one stretch of the network, for one sequence.

    layers, tokens    how many layers it runs, on how many tokens per sequence
    keys              keys that each query is multiplied with; 0 where nothing attends
    recursion         of the shared core, from 1; 0 outside it
    projections       into and out of what mixes positions, grouped queries counted as they are; an H-Net's residual
                      projection
    attention         scores and values over all pairs (executed); `attention_useful` over the causal pairs
    state_space       a scan in blocks, all pairs of a block and padding included; `state_space_useful` over the causal
                      pairs of positions that exist; `state_space_again`: what its backward pass always computes a
                      second time
    feed_forward      `experts` of it in experts, whose matmuls have a batch axis
    router            what decides: depth (token choice: all of it at the first recursion), experts, where chunks begin;
                      `router_inside` of it inside layers; `router_train`: with its backward pass
    last              of all these what layer-wise recomputation leaves out: matmuls at the end of its units, whose
                      results no gradient needs, and those outside of any; `experts_last` of it in experts
    """

    name: str = ""
    layers: int = 0
    tokens: float = 0.0
    keys: float = 0.0
    recursion: int = 0
    projections: float = 0.0
    attention: float = 0.0
    attention_useful: float = 0.0
    state_space: float = 0.0
    state_space_useful: float = 0.0
    state_space_again: float = 0.0
    feed_forward: float = 0.0
    experts: float = 0.0
    router: float = 0.0
    router_inside: float = 0.0
    router_train: float = 0.0
    head: float = 0.0
    last: float = 0.0
    experts_last: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Both, on the same positions; name, tokens and recursion are the first one's."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("layers", *_FLOPS)}
        return dataclasses.replace(self, keys=max(self.keys, other.keys), **sums)

    def __mul__(self, layers: int) -> "Cost":
        """So many layers of which each costs this."""
        return dataclasses.replace(self, layers=layers, **{name: layers * getattr(self, name) for name in _FLOPS})

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass as executed."""
        return self.projections + self.attention + self.state_space + self.feed_forward + self.router + self.head

    @property
    def useful(self) -> float:
        """FLOPs of a forward pass over causal pairs alone."""
        return self.forward - self._idle

    @property
    def train(self) -> float:
        """FLOPs of forward and backward as executed under remat "none"."""
        return 3 * (self.forward - self.router) + self.router_train + self.state_space_again

    @property
    def train_useful(self) -> float:
        """FLOPs of forward and backward over causal pairs alone, nothing computed twice."""
        return self.train - self.state_space_again - 3 * self._idle

    def recomputed(self, remat: str) -> float:
        """FLOPs of the second forward pass: under "layer" all matmuls of the layers but `last`; under "dots" those with
        a batch axis, in attention, scans and experts, which are not kept, but the last of experts. Under "attention"
        the same, where its reference computes attention: of that nothing can be kept."""
        match remat:
            case "layer":
                inside = self.projections + self.attention + self.state_space + self.feed_forward + self.router_inside
                return inside - self.last
            case "attention" | "dots":
                return self.attention + self.state_space + self.experts - self.experts_last
        return 0.0

    @property
    def _idle(self) -> float:
        return self.attention - self.attention_useful + self.state_space - self.state_space_useful


_FLOPS = tuple(f.name for f in dataclasses.fields(Cost) if f.type is float and f.name not in ("tokens", "keys"))
