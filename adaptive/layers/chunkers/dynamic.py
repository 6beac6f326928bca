"""Dynamic chunking: a chunk begins where neighbours point apart.

H-Net paper, section 2.2; released code, modules/dc.py.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.layers.chunkers import Chunker, ChunkerModule, Heard
from adaptive.layers.site import param
from adaptive.routing.boundaries import Boundaries, ratio_losses
from adaptive.routing.types import Aux, AuxLosses
from adaptive.settings import ranged

FLOOR = 1e-12  # of the norms in the cosine: a zero vector has a similarity, and a finite gradient


@dataclasses.dataclass(frozen=True)
class Settings(Chunker):
    """p = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, a chunk where p > 1/2 (equation 4)."""

    learned: ClassVar[bool] = True

    target: float = ranged(6.0, above=1)  # positions per chunk that the ratio loss pulls to
    ratio_coefficient: float = ranged(0.03, least=0)
    ratio_over: Literal["global", "device"] = "global"  # positions that the ratio loss averages over: all of the batch,
    # or each device's own (the release)

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Dynamic(width)

    def expected(self) -> float:
        return self.target

    def parameters(self, width: int) -> int:
        return 2 * width**2

    def losses(
        self, found: Boundaries, exists: jax.Array, stage: int, shards: int
    ) -> tuple[AuxLosses, dict[str, jax.Array]]:
        losses = ratio_losses(found, exists, self.target, shards)
        aux = AuxLosses({f"ratio_loss_{stage}": Aux(losses[self.ratio_over], self.ratio_coefficient)})
        return aux, {f"ratio_loss_{over}_{stage}": loss.value for over, loss in losses.items()}


class Dynamic(ChunkerModule):
    """Always float32: near one half bfloat16 has steps of 2^-9. W_q and W_k begin as the identity."""

    def __init__(self, width: int):
        self.q: nnx.Param = param(jnp.eye(width), (None, None), role="matrix")
        self.k: nnx.Param = param(jnp.eye(width), (None, None), role="matrix")

    def __call__(self, heard: Heard) -> Boundaries:
        prob = jnp.where(heard.first, 1.0, self.probability(heard))
        return Boundaries(prob, prob > 0.5)

    def probability(self, heard: Heard) -> jax.Array:
        """f32[batch, n], without regard to documents."""
        q, k = (_unit(x, w[...]) for x, w in ((heard.before, self.q), (heard.hidden, self.k)))
        return jnp.clip((1 - (q * k).sum(-1)) / 2, 0.0, 1.0)


def _unit(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [batch, n, width] through `weight` [width, out], scaled to length one, in float32."""
    y = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    # The norm's square, not the norm, is bounded from below: at zero the root has no derivative.
    return y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), FLOOR**2))
