"""The optax chain of a recipe, and which parameters each part of it touches."""

from typing import Any

import jax
import optax

from adaptive.optim.config import OptimizerConfig, ScheduleConfig
from adaptive.optim.schedule import make_schedule


def make_optimizer(config: OptimizerConfig, schedule: ScheduleConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, schedule; norms are not decayed (MoR paper, appendix on set-up; released code).

    Auxiliary routers, which the language-model loss does not reach, get a chain of their own: their gradients are
    clipped apart from the rest.
    """

    def chain() -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(make_schedule(schedule, config.learning_rate, steps)),
        )

    return optax.partition({"main": chain(), "auxiliary": chain()}, groups)


def decayed(params: Any) -> Any:
    """True for every parameter but the scales of norms and biases; same tree as `params`."""

    def one(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(one, params)


def groups(params: Any) -> Any:
    """ "auxiliary" for the parameters of auxiliary routers, "main" for all others; same tree as `params`."""

    def group(path: Any, _: Any) -> str:
        return "auxiliary" if "aux_routers" in jax.tree_util.keystr(path) else "main"

    return jax.tree_util.tree_map_with_path(group, params)
