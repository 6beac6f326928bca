"""What one pass through a model is about, and what every part returns of it."""

__all__ = ["Call", "Rule", "Tales", "Told", "below", "stacked"]

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive.routing.replay import Replay
from adaptive.routing.types import Told

Rule = Literal["train", "causal"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "key", "layer", "previous", "given", "passes", "experts_per_token", "replay", "mask_ratio"],
    meta_fields=["rule", "sees", "limited", "training", "counts", "keep", "writes", "rows", "record"],
)
@dataclasses.dataclass(frozen=True)
class Call:
    """One value for what a pass is about, handed down whole.

    rule      "train": routers decide as they are trained, over all they see; "causal": each position decides from its
              past alone, as in generation
    sees      "past", or "all": whether attention is causal
    limited   whether the capacities of training hold
    training  whether noise and warm-ups apply
    counts    whether parts tell what they did for each position, and attention the queries and keys that it reads; in
              training they do not
    keep      whether parts return the state after the pass even where they were given none
    writes    whether positions enter the state that they read; False: they read it as it is
    step      i32[] training step, while a warm-up lasts; None: none does
    key       PRNG key of this part's noise; None: none is drawn
    layer     number of the layer, or of a stack's first, in the unrolled network
    previous  f32[rows, n, choices]: logits of the router of the layer below, for routers that read them
    given     what came with the batch by name ("tokens", "boundaries"), of the outermost positions alone
    passes    of a recursion: how many there are at most, a number, or i32[] traced where all positions take the same;
              None: as the settings say
    experts_per_token  i32[rows]: average in each row, for routers whose experts take tokens; None: as the settings say
    mask_ratio  f32[rows]: share of each row's tokens that are hidden, for routers whose capacity follows it; None: no
              objective says
    rows      decoding of one position per row: how many rows with a new chunk a network inside an H-Net computes at
              once, or with a pass to take a recursion; 0: all rows
    record    whether parts tell what they decided for each position though they do not count
    replay    what is decided, in place of what routers would; None: they decide
    """

    rule: Rule = "train"
    sees: Literal["past", "all"] = "past"
    limited: bool = True
    training: bool = False
    counts: bool = True
    keep: bool = False
    writes: bool = True
    step: jax.Array | None = None
    key: jax.Array | None = None
    layer: Any = 0
    previous: jax.Array | None = None
    given: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    passes: int | jax.Array | None = None
    experts_per_token: jax.Array | None = None
    mask_ratio: jax.Array | None = None
    rows: int = 0
    record: bool = False
    replay: Replay | None = None

    def replace(self, **changes: Any) -> "Call":
        return dataclasses.replace(self, **changes)

    def at_most(self, passes: int) -> int:
        """The passes of a recursion that has so many by its settings, for strategies that decide for each position."""
        return min(passes, self.passes) if isinstance(self.passes, int) else passes

    def at(self, layer: Any) -> "Call":
        """The call as the layer of this number has it: noise of its own."""
        key = None if self.key is None else jax.random.fold_in(self.key, layer)
        return self.replace(layer=layer, key=key)


Tales = dict[str, Told]  # by the part's path in the model


def below(name: str, told: Tales) -> Tales:
    """Paths of a part's parts, seen from outside."""
    return {f"{name}/{path}" if path else name: one for path, one in told.items()}


def stacked(told: "list[Tales]") -> Tales:
    """Calls of the same parts one after another, as one entry each with a new leading axis. They may compute different
    numbers of positions, so arrays by position are padded with zeros."""

    def join(*calls: Told) -> Told:
        widest = {name: max(c.per_token[name].shape[-1] for c in calls) for name in calls[0].per_token}
        widen = lambda a, n: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, n - a.shape[-1])])  # noqa: E731
        padded = [c._replace(per_token={k: widen(v, widest[k]) for k, v in c.per_token.items()}) for c in calls]
        return jax.tree.map(lambda *a: jnp.stack(a), *padded)

    return {path: join(*(tale[path] for tale in told)) for path in told[0]} if told else {}
