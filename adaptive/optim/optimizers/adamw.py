"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

import dataclasses
from typing import TYPE_CHECKING

from adaptive.optim.optimizers import Optimizer
from adaptive.settings import ranged

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Settings(Optimizer):
    """Matrices are decayed, embeddings and routers among them (MoR release)."""

    beta1: float = ranged(0.9, least=0, below=1)
    beta2: float = ranged(0.95, least=0, below=1)
    eps: float = ranged(1e-8, above=0)

    def update(self) -> "optax.GradientTransformation":
        import optax

        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)
