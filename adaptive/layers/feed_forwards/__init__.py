"""Feed-forwards: what each position goes through alone, dense or routed. One file each, found by its name, with a
dataclass `Settings` below `FeedForward` and the module that it builds."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from adaptive.layers.call import Call, Told
from adaptive.layers.cost import Cost
from adaptive.layers.site import Site
from adaptive.layers.where import Where
from adaptive.routing.types import Summed
from adaptive.settings import Member


@dataclasses.dataclass(frozen=True)
class FeedForward(Member):
    """Settings of a feed-forward."""

    door: ClassVar[str] = __name__

    def build(self, site: Site, key: jax.Array) -> "FeedForwardModule":
        raise NotImplementedError

    def kernels(self) -> tuple[str, ...]:
        """Operations that it computes with, each a package of `kernels_pallas` or "routing"."""
        return ()

    def check(self, width: int, at: str) -> None:
        """Raises RecipeError for settings that cannot work in a stream of this width; `at` is their dotted path."""

    def own_norm(self) -> bool:
        """Whether it normalises its input itself."""
        return False

    def parameters(self, width: int) -> int:
        """Parameters of a layer in a stream of this width."""
        raise NotImplementedError

    def cost(self, tokens: float, site: Site) -> Cost:
        """FLOPs of a layer for a sequence of `tokens` tokens, on average over the layers of `site`; `last` are the
        matmuls that write to the stream, where no gradient needs their results."""
        raise NotImplementedError


class FeedForwardModule(nnx.Module):
    """One layer's feed-forward; its parameters may be those of many layers, of which a scan slices one.

    reads_previous  whether it reads the router logits of the layer below
    choices         columns of these logits
    """

    reads_previous: bool = False
    choices: int = 0

    def apply(self, x: jax.Array, where: Where, call: Call) -> tuple[jax.Array, Told, jax.Array | None]:
        """x [rows, n, width] -> (its update of the same shape, what it did, logits of its router if it has one)."""
        raise NotImplementedError

    def update(self, stats: dict[str, jax.Array]) -> None:
        """Moves the buffers by the sums of a whole step, each with the buffers' leading axes."""

    def losses(self, told: list[Told]) -> dict[str, tuple[Summed, float]]:
        """(f32[], coefficient) of each loss of all calls together, of layers like this one; each call's leading axes
        are those of its losses."""
        return {}

    def describe(self) -> str:
        """What computes a token, in a few words for the plan of a run; empty for a dense one."""
        return ""

    def no_gradient(self) -> str:
        """Why no loss can reach its router, with what would help; empty where one does."""
        return ""

    def refuse_generation(self) -> str:
        """Why it cannot generate; empty where it can."""
        return ""

    def selects_alike(self) -> bool:
        """Whether the rules "train" and "causal" select the same."""
        return True

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError
