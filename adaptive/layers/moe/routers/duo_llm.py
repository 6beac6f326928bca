"""Duo-LLM: a big and a small feed-forward side by side, and a router between them (arXiv 2410.10846).

phase=random  stage 1: every token takes big or small (or skips) with equal probability, independently per layer
phase=router  stage 3: P = softmax(h / tau) of a linear router's logits h, output sum_x P_x H_x, tau falling with every
              step so that the assignment hardens; with random_steps the first steps are stage 1

Stage 2, the oracle over all paths, is `adaptive.inference.duo_oracle`.

"threshold" selection (generation) takes the largest logit, and then a token pays for its own feed-forward alone: each
computes the rows gathered for it. "topk" mixes as in training and computes both for every token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from adaptive.errors import RecipeError
from adaptive.layers.moe.base import Context, RoutedLayer, Routing, poisoned, shape_in, statistics
from adaptive.layers.moe.compute import computed
from adaptive.layers.moe.experts import Experts
from adaptive.layers.moe.gates import LinearGate, where_present
from adaptive.layers.moe.settings import Execution, ExpertCost, MoESettings, RouterSettings
from adaptive.layers.site import Site
from adaptive.routing.dispatch import Dispatch, by_mask, by_token
from adaptive.routing.losses import averaged
from adaptive.routing.types import Summed
from adaptive.settings import ranged

BIG, SMALL, SKIP = range(3)


@dataclasses.dataclass(frozen=True)
class Settings(RouterSettings):
    """The paper: a big feed-forward of 10240, a small one of 640. It prints neither alpha nor tau: ours. The big one's
    width is expert_size."""

    even: ClassVar[bool] = False  # the two are of different sizes

    phase: Literal["random", "router"] = "router"
    small_size: int = ranged(0, least=0)  # hidden width of the small feed-forward; 0: a sixteenth of the big one's
    skip: bool = False  # a third choice, which computes nothing
    random_steps: int = ranged(0, least=0)  # phase=router: steps of stage 1 that come first
    budget: float = ranged(0.5, least=0, most=1)  # share of big that the router is to have, over all layers and tokens
    budget_coefficient: float = ranged(1.0, least=0)  # alpha
    tau: float = ranged(1.0, above=0)  # at the first step with a router, multiplied by tau_decay at each
    tau_decay: float = ranged(0.998, above=0, most=1)
    tau_last: float = ranged(0.1, above=0)  # the least that it becomes
    untrained: Literal["big", "small"] = "big"  # phase=random: what evaluation and generation take
    slack: float = ranged(0.0, least=0)  # above 0: big computes at most ceil(slack budget n) of n tokens

    def check(self, config: MoESettings, at: str) -> None:
        if config.experts != 2 or config.shared_size:
            raise RecipeError(
                f"{at}.router=duo_llm has two experts, big and small: set {at}.experts=2 (not {config.experts}) and "
                f"{at}.shared_size=0"
            )

    def zeros(self) -> int:
        return int(self.skip)

    def unread(self) -> dict[str, str]:
        if self.phase == "router":
            return {"untrained": "phase=router"}
        names = ("random_steps", "budget_coefficient", "tau", "tau_decay", "tau_last")
        return dict.fromkeys(names, "phase=random has no router yet")

    def coefficients(self) -> dict[str, float]:
        return {"budget_loss": self.budget_coefficient}

    def sizes(self, config: MoESettings) -> tuple[int, int]:
        """Hidden widths of the big and the small feed-forward."""
        return config.expert_size, self.small_size or max(1, config.expert_size // 16)

    def layer_parameters(self, config: MoESettings, width: int) -> int:
        return self.matrices(config, width) + config.matrices() * width * sum(self.sizes(config))

    def layer_cost(self, config: MoESettings, tokens: float, site: Site) -> ExpertCost:
        both = self.phase == "router" or config.execution == "dense"
        share = 1.0 if both else 1 / config.choices
        router = 2.0 * tokens * self.matrices(config, site.width)
        # Stage 1 has logits for the statistics alone.
        router_train = router * (1 if self.phase == "random" else 3)
        experts = 2.0 * config.matrices() * tokens * share * site.width * sum(self.sizes(config))
        return ExpertCost(router, router_train, experts)


class Forced(nnx.Variable):
    """The choice i32[] that every token of a layer takes."""


class Layer(RoutedLayer):
    """Big, small or nothing per token. Choices are big, small, and with `skip` skip (a zero expert).

    router.weight       f32[width, choices]
    big.gate, big.up    f32[1, width, hidden], big.down f32[1, hidden, width]; small.* alike with its own hidden width;
                        no gate where gated=False
    tau                 f32[], steps f32[]: buffers of the annealing
    forced              Forced, during an oracle's search alone

    With `slack`, the first tokens of a sequence that want big have it and the others take small ("overflow" of the
    statistics): causal, but only within one forward pass, because a cache does not know how many had it. Its slots are
    a static bound under execution=capacity. Otherwise every token has what it wants.

    budget_loss, over all layers: the mean over sequences of (mean over layers and tokens of P_big - budget)^2.
    """

    def __init__(self, config: MoESettings, site: Site, key: jax.Array):
        router, big, small = jax.random.split(key, 3)
        self.settings, self.site = config, site
        assert isinstance(config.router, Settings)
        self.options = o = config.router
        self.choices = config.choices
        self.big_size, self.small_size = o.sizes(config)
        self.router = LinearGate(self.choices, site, router)
        one = dataclasses.replace(config, experts=1)
        self.big = Experts(one, site, big)
        self.small = Experts(dataclasses.replace(one, expert_size=self.small_size), site, small)
        self.tau, self.steps = site.buffer(jnp.array(o.tau)), site.buffer(jnp.zeros(()))
        self.forced: Forced | None = None

    @classmethod
    def shape_of(cls, arrays: Mapping[str, jax.Array]) -> tuple[int, dict[str, Any]]:
        _, width, hidden = shape_in(arrays, "big.up", 3)
        _, choices = shape_in(arrays, "router.weight", 2)
        small = shape_in(arrays, "small.up", 3)[-1]
        own = {"small_size": small, "skip": choices == 3}
        return width, own | {"experts": 2, "expert_size": hidden, "gated": "big.gate" in arrays}

    def routed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        x = jnp.asarray(x)
        logits = self.router(x)
        present = where_present(context.present, x.shape[:2])
        choice = self._choice(logits, context)
        if choice is None:
            share = jnp.where(present[..., None], self._mixture(logits, context), 0.0)
            if context.replayed is not None:  # where one of them was taken alone
                one = context.replayed.sum(-1, keepdims=True) == 1
                share = jnp.where(one, context.replayed.astype(jnp.float32), share)
            mask = jnp.broadcast_to(present[..., None], (*present.shape, 2))
            mask = mask if context.kept is None else context.kept
            dispatch = by_mask(mask, share[..., :2], zero_weights=share[..., 2:])
            claimed = jnp.pad(mask.sum((0, 1)).astype(jnp.float32), (0, self.choices - 2))
            overflow = jnp.zeros((), jnp.float32)
        else:
            share = jnp.where(present[..., None], jax.nn.one_hot(choice, self.choices, dtype=jnp.float32), 0.0)
            claimed = share.sum((0, 1))
            taken = self._within_slack(choice, present, context.replayed is not None)
            overflow = (taken != choice).sum().astype(jnp.float32)
            zero = (
                jnp.where(present, taken == SKIP, False).astype(jnp.float32)[..., None] if self.options.skip else None
            )
            valid = present & (taken < SKIP)
            ones = jnp.ones((*taken.shape, 1), jnp.float32)
            dispatch = by_token(taken[..., None], ones, valid[..., None], 2, zero_weights=zero)
        y, lost = self._computed(x, dispatch, "dense" if choice is None else _each_its_own(self.settings.execution))
        stats = statistics(dispatch, logits, claimed, context.present)
        stats |= {"lost": lost, "overflow": overflow, "big": jax.lax.stop_gradient(share[..., BIG]).sum()}
        parts = {"big": share[..., BIG].sum(1), "tokens": present.sum(1).astype(jnp.float32)}
        return poisoned(y, logits).astype(x.dtype), Routing(dispatch, {}, stats, parts, logits)

    def joint_losses(self, parts: dict[str, jax.Array]) -> dict[str, Summed]:
        if self.options.phase == "random":
            return {}
        tokens = parts["tokens"].sum(0)
        share = parts["big"].sum(0) / jnp.maximum(tokens, 1.0)
        return {"budget_loss": averaged(jnp.square(share - self.options.budget), tokens > 0)}

    def update(self, stats: dict[str, jax.Array]) -> None:
        o = self.options
        self.steps[...] = self.steps[...] + 1
        colder = jnp.maximum(self.tau[...] * o.tau_decay, o.tau_last)
        self.tau[...] = jnp.where(self.steps[...] > o.random_steps, colder, self.tau[...])

    def describe(self) -> str:
        skip = ", or none" if self.options.skip else ""
        return f"a feed-forward of {self.big_size} or one of {self.small_size} hidden units{skip}"

    def selects_alike(self) -> bool:
        return self.options.phase == "random"

    # Parts

    def _choice(self, logits: jax.Array, context: Context) -> jax.Array | None:
        """The one choice i32[batch, seq] of every token; None where the choices are mixed."""
        o = self.options
        if context.replayed is not None and (o.phase == "random" or context.selection == "threshold"):
            return jnp.argmax(context.replayed, axis=-1).astype(jnp.int32)
        if self.forced is not None:
            return jnp.broadcast_to(self.forced[...], logits.shape[:2])
        if o.phase == "random":
            drawn = self._drawn(logits, context)
            if drawn is not None:
                return drawn
            return jnp.full(logits.shape[:2], BIG if o.untrained == "big" else SMALL, jnp.int32)
        if context.selection == "threshold":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return None

    def _mixture(self, logits: jax.Array, context: Context) -> jax.Array:
        """Weights f32[batch, seq, choices] of the choices in training."""
        share = jax.nn.softmax(logits / self.tau[...], axis=-1)
        choice = self._drawn(logits, context) if self.options.random_steps else None
        if choice is None:
            return share
        drawn = jax.nn.one_hot(choice, self.choices, dtype=jnp.float32)
        return jnp.where(self.steps[...] < self.options.random_steps, drawn, share)

    def _drawn(self, logits: jax.Array, context: Context) -> jax.Array | None:
        draw = lambda key: jax.random.randint(key, logits.shape[:2], 0, self.choices, jnp.int32)  # noqa: E731
        return context.drawn(context.noise.choice, draw)

    def most_big(self, tokens: int) -> int:
        """The most of `tokens` tokens of one sequence that big computes, where each takes one choice."""
        o = self.options
        if not o.slack:
            return tokens
        return max(1, min(tokens, math.ceil(round(o.slack * o.budget * tokens, 9))))

    def _within_slack(self, choice: jax.Array, present: jax.Array, replayed: bool) -> jax.Array:
        """`choice` with small in place of big for the tokens that find no slot, unless it is replayed."""
        if not self.options.slack or replayed:
            return choice
        wants = (choice == BIG) & present
        late = wants & (jnp.cumsum(wants, axis=1) > self.most_big(choice.shape[1]))
        return jnp.where(late, SMALL, choice)

    def _computed(self, x: jax.Array, dispatch: Dispatch, execution: Execution) -> tuple[jax.Array, jax.Array]:
        """(sum of weight * feed-forward f32[batch, seq, width], pairs lost in communication f32[])."""
        weights = dispatch.combine_matrix().reshape(*x.shape[:2], -1)
        mask = dispatch.mask()
        y, lost = jnp.zeros(x.shape, jnp.float32), jnp.zeros((), jnp.float32)
        for expert, experts in ((BIG, self.big), (SMALL, self.small)):
            alone = by_token(
                jnp.zeros((*x.shape[:2], 1), jnp.int32),
                weights[..., expert, None],
                mask[..., expert, None],
                1,
                most_per_sequence=self.most_big(x.shape[1]) if expert == BIG and execution != "dense" else None,
            )
            out, gone = computed(experts, x, alone, execution)
            y, lost = y + out, lost + gone
        return y, lost


def _each_its_own(execution: Execution) -> Execution:
    """How each feed-forward computes the rows gathered for it: "auto" cannot see from shapes that they are few."""
    return "ragged" if execution == "auto" else execution
