"""Optimizers: which update follows from a gradient. One file each, found by its name, with a dataclass `Settings` below
`Optimizer`."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from adaptive.settings import Member, ranged

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Optimizer(Member):
    """Clipping by the global norm, the member's update, weight decay, and the learning rate, in this order
    (adaptive/optim/build.py)."""

    door: ClassVar[str] = __name__
    before: ClassVar[str] = "adamw"

    learning_rate: float = ranged(3e-3, above=0)  # peak
    weight_decay: float = ranged(0.1, least=0)
    clip_norm: float = ranged(1.0, above=0)
    decay: Literal["matrices", "official"] = "matrices"  # official: all but what the H-Net release leaves out of decay

    def update(self) -> "optax.GradientTransformation":
        """From gradients, a tree of `nnx.Param`, to updates that the learning rate multiplies."""
        raise NotImplementedError
