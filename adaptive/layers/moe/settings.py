"""Settings of a mixture of experts, and the base of those of its router: plain data, and what a layer costs."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

from adaptive.errors import RecipeError
from adaptive.layers.cost import Cost
from adaptive.layers.feed_forwards import FeedForward
from adaptive.layers.site import Site
from adaptive.routing.capacity import Drop, slots
from adaptive.settings import Member, ranged

Execution = Literal["auto", "capacity", "ragged", "dense"]
Activation = Literal["silu", "gelu", "relu"]


class ExpertCost(NamedTuple):
    """Matmul FLOPs of a layer for one sequence: its router's forward, and with the backward; its experts' forward."""

    router: float
    router_train: float
    experts: float


@dataclasses.dataclass(frozen=True)
class MoESettings(FeedForward):
    """Experts in place of a feed-forward, and the router that assigns tokens to them."""

    router: "RouterSettings"
    experts: int = ranged(8, least=1)  # true experts, those that compute
    expert_size: int = ranged(176, least=1)  # hidden width of each
    shared_size: int = ranged(0, least=0)  # hidden width of a dense feed-forward that every token takes too; 0: none
    gated: bool = True  # act(x gate) * (x up), or act(x up) alone
    activation: Activation = "silu"
    execution: Execution = "auto"  # how experts are computed; equal results

    @property
    def choices(self) -> int:
        """Of the router: true experts, then those that compute nothing."""
        return self.experts + self.router.zeros()

    def kernels(self) -> tuple[str, ...]:
        return ("routing",) if self.execution in ("capacity", "dense") else ("routing", "grouped_matmul")

    def check(self, width: int, at: str) -> None:
        self.router.check(self, at)

    def parameters(self, width: int) -> int:
        """Parameters of a layer in a stream of this width."""
        return self.router.layer_parameters(self, width)

    def own_norm(self) -> bool:
        return self.router.own_norm

    def cost(self, tokens: float, site: Site) -> Cost:
        if not tokens:
            return Cost()
        router, router_train, experts = self.router.layer_cost(self, tokens, site)
        shared = 6.0 * tokens * site.width * self.shared_size
        # Nothing needs what the shared feed-forward gives, nor what experts do: `routed_swiglu`.
        down = 0.0 if self.router.weighs_sum else (experts - shared) / self.matrices()
        return Cost(
            feed_forward=experts,
            experts=experts - shared,
            router=router,
            router_inside=router,
            router_train=router_train,
            last=shared / 3 + down,
            experts_last=down,
        )

    def matrices(self) -> int:
        """Matrices of an expert."""
        return 3 if self.gated else 2


@dataclasses.dataclass(frozen=True)
class RouterSettings(Member):
    """Settings of a router. `config` is always the mixture that they are part of, `at` its dotted path."""

    door: ClassVar[str] = "adaptive.layers.moe.routers"
    even: ClassVar[bool] = True  # whether experts are meant to have equal shares of the tokens
    own_norm: ClassVar[bool] = False  # whether its layer normalises its input itself
    weighs_sum: ClassVar[bool] = False  # whether its layer weighs the experts' sum, so that a gradient needs that

    def check(self, config: MoESettings, at: str) -> None:
        """Raises RecipeError for settings that cannot work, with what would."""

    def zeros(self) -> int:
        """Experts that compute nothing and are not dispatched to."""
        return 0

    def against_starving(self, at: str) -> str:
        """What to change where experts of a router that is `even` get next to no tokens."""
        return f"use {at}.router=expert_choice"

    def against_dropping(self, at: str) -> str:
        """What to change where many pairs of a token and an expert are dropped."""
        return f"raise the bounds in {at}.router"

    def per_token(self) -> float:
        """Choices of a token, on average."""
        return 1.0

    def coefficients(self) -> dict[str, float]:
        """Coefficient of each loss that the router or its layer returns."""
        return {}

    def pairs(self, config: MoESettings, tokens: float, site: Site) -> float:
        """Pairs of a token and a true expert that are computed for a sequence of `tokens` tokens, or are expected."""
        return tokens * self.per_token()

    def matrices(self, config: MoESettings, width: int) -> int:
        """Parameters of its matrices, which multiply every token."""
        return width * config.choices

    def vectors(self, config: MoESettings, width: int) -> int:
        """Its other parameters."""
        return 0

    def train_flops(self, config: MoESettings, tokens: float, width: int) -> float:
        """Matmul FLOPs of the router, forward and backward."""
        return 6.0 * tokens * self.matrices(config, width)

    def layer_parameters(self, config: MoESettings, width: int) -> int:
        """Parameters of the whole layer."""
        experts = config.matrices() * config.experts * width * config.expert_size
        own = self.matrices(config, width) + self.vectors(config, width)
        return own + experts + 3 * width * config.shared_size

    def layer_cost(self, config: MoESettings, tokens: float, site: Site) -> ExpertCost:
        """FLOPs of the whole layer."""
        width = site.width
        experts = 2.0 * config.matrices() * self.pairs(config, tokens, site) * width * config.expert_size
        return ExpertCost(
            2.0 * tokens * self.matrices(config, width),
            self.train_flops(config, tokens, width),
            experts + 6.0 * tokens * width * config.shared_size,
        )


@dataclasses.dataclass(frozen=True)
class PerToken(RouterSettings):
    """Settings of a router whose tokens have a number of experts."""

    experts_per_token: float = ranged(2.0, above=0)

    def per_token(self) -> float:
        return self.experts_per_token

    def check(self, config: MoESettings, at: str) -> None:
        if self.experts_per_token > config.experts:
            raise RecipeError(
                f"{at}.router.experts_per_token={self.experts_per_token:g}: must be above 0 and at most "
                f"{at}.experts={config.experts}"
            )


@dataclasses.dataclass(frozen=True)
class Bounded(PerToken):
    """The same, of which training may bound the pairs of a sequence."""

    row_slack: float = ranged(0.0, least=0)  # at most slack * experts_per_token pairs per token; 0: no bound

    def check(self, config: MoESettings, at: str) -> None:
        super().check(config, at)
        if 0 < self.row_slack < 1:
            raise RecipeError(f"{at}.router.row_slack={self.row_slack:g}: must be at least 1, or 0 for no bound")

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.row_slack (0 drops nothing)"


@dataclasses.dataclass(frozen=True)
class Scored(PerToken):
    """The same with a loss on the size of its logits."""

    z_coefficient: float = ranged(0.0, least=0)

    def coefficients(self) -> dict[str, float]:
        return {"router_z_loss": self.z_coefficient}


@dataclasses.dataclass(frozen=True)
class Balanced(Scored):
    """The same with a balancing loss."""

    balance_coefficient: float = ranged(0.01, least=0)  # mean over layers

    def coefficients(self) -> dict[str, float]:
        return super().coefficients() | {"load_balancing_loss": self.balance_coefficient}

    def against_starving(self, at: str) -> str:
        return f"raise {at}.router.balance_coefficient or {super().against_starving(at)}"


@dataclasses.dataclass(frozen=True)
class Chosen(Balanced):
    """The same, every token choosing a whole number."""

    experts_per_token: int = ranged(2, least=1)


@dataclasses.dataclass(frozen=True)
class Limited(Chosen):
    """The same with a capacity of every expert."""

    capacity_factor: float = ranged(0.0, least=0)  # slots of an expert over its balanced load; 0: nothing is dropped
    capacity_group: Literal["sequence", "batch"] = "sequence"  # over which tokens slots are counted
    drop: Drop = "weight"  # who stays when an expert is full; see adaptive.routing.capacity

    def slots(self, config: MoESettings, tokens: Any) -> Any:
        """Slots of an expert for `tokens` tokens, an int or i32[...] of them; zero experts take their share."""
        return slots(tokens, self.experts_per_token, config.choices, self.capacity_factor)

    def against_dropping(self, at: str) -> str:
        return f"raise {at}.router.capacity_factor (0 drops nothing)"

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing beside the others, and why."""
        names = () if self.capacity_factor else ("capacity_group", "drop")
        return dict.fromkeys(names, "capacity_factor=0 drops nothing")
