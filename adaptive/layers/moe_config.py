"""Shape and routing of a mixture of experts: plain data, importable without jax."""

import dataclasses
from typing import Literal

from adaptive.errors import RecipeError

Drop = Literal["weight", "position", "token", "choice", "batch"]
Execution = Literal["auto", "capacity", "ragged", "dense"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts in place of a layer's feed-forward, and the router that assigns tokens to them.

    `router` names a file of adaptive/layers/moe/routers, whose `Options` list the settings of `options`.
    """

    router: str = "none"  # "none": every layer has a dense feed-forward
    experts: int = 8  # true experts, those that compute
    expert_size: int = 0  # hidden width of each; 0: model.intermediate_size
    experts_per_token: float = 2.0  # top-k of token choice; the average under expert choice
    shared_size: int = 0  # hidden width of a dense feed-forward that every token takes as well; 0: none
    gated: bool = True  # act(x gate) * (x up), or act(x up) alone
    activation: Literal["silu", "gelu", "relu"] = "silu"
    capacity_factor: float = 0.0  # token choice: slots of an expert over its balanced load; 0: dropless
    capacity_group: Literal["sequence", "batch"] = "sequence"  # over which tokens slots are counted
    drop: Drop = "weight"  # who stays when an expert is full; see adaptive.routing.capacity
    execution: Execution = "auto"  # how experts are computed; equal results
    balance_coefficient: float = 0.01  # of the balancing loss: 1 when balanced, mean over layers
    z_coefficient: float = 0.0
    dense_layers: tuple[int, ...] = ()  # layers, from 0, that keep a dense feed-forward
    options: tuple[str, ...] = ()  # the router's own settings, as name=value

    def validate(self, num_layers: int) -> None:
        """Raises RecipeError for the first setting that cannot work, with what would."""
        if self.router == "none":
            return
        for name in ("experts", "shared_size", "expert_size"):
            low = 1 if name == "experts" else 0
            if getattr(self, name) < low:
                raise RecipeError(f"model.moe.{name}={getattr(self, name)}: must be at least {low}")
        if not 0 < self.experts_per_token <= self.experts:
            raise RecipeError(
                f"model.moe.experts_per_token={self.experts_per_token:g}: must be above 0 and at most "
                f"model.moe.experts={self.experts}"
            )
        if self.capacity_factor < 0:
            raise RecipeError(
                f"model.moe.capacity_factor={self.capacity_factor:g}: 1 is the balanced load, 0 drops nothing"
            )
        wrong = [i for i in self.dense_layers if not 0 <= i < num_layers]
        if wrong:
            raise RecipeError(f"model.moe.dense_layers: {wrong[0]} is not a layer of 0..{num_layers - 1}")
