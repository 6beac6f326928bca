"""Muon (Jordan et al. 2024, github.com/KellerJordan/Muon): momentum, orthogonalised, for matrices inside the network.

Embeddings, the output head, vectors, biases and kernels of convolutions have AdamW's update, with the settings of that
name. Updates of matrices are scaled to AdamW's usual size (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one
learning rate and one weight decay are those of both. Which dimensions a matrix reads and writes, and which are stacked
(passes, layers, experts), its axes tell.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from adaptive.optim.optimizers import adamw
from adaptive.settings import ranged

if TYPE_CHECKING:
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of each of five Newton-Schulz steps (Jordan et al.)


@dataclasses.dataclass(frozen=True)
class Settings(adamw.Settings):
    """beta1, beta2 and eps are AdamW's."""

    momentum: float = ranged(0.95, least=0, below=1)  # Nesterov's
    rms: float = ranged(0.2, above=0)  # root mean square of an update before the learning rate

    def update(self) -> "optax.GradientTransformation":
        import jax
        import numpy as np
        import optax
        from optax.contrib import scale_by_muon

        from adaptive.optim.groups import matrices, updated_by_muon

        coefficients: Any = np.asarray(COEFFICIENTS, np.float32)
        orthogonal = scale_by_muon(coefficients, beta=self.momentum, weight_dimension_numbers=matrices)
        sized = optax.stateless(lambda updates, _: jax.tree.map(self._sized, updates, matrices(updates)))
        muon = optax.chain(orthogonal, sized)
        return optax.partition({"muon": muon, "adamw": super().update()}, updated_by_muon)

    def _sized(self, update: "jax.Array", dimensions: "MuonDimensionNumbers") -> "jax.Array":
        """An orthogonal update, whose squares add up to its smaller side, with the mean square rms^2."""
        sides = (math.prod(update.shape[i] for i in places) for places in dimensions)
        return update * (self.rms * math.sqrt(max(sides)))
