"""The optax chain of a recipe."""

from typing import Any

import jax
import optax

from adaptive.optim.config import ScheduleConfig
from adaptive.optim.groups import decayed, groups, rates
from adaptive.optim.optimizers import Optimizer
from adaptive.optim.schedule import make_schedule


def make_optimizer(config: Optimizer, schedule: ScheduleConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, the optimizer's update, weight decay, schedule; norms are not decayed (MoR paper, appendix
    on set-up; released code).

    Parameters that the language-model loss does not reach get a chain of their own: their gradients are clipped apart
    from the rest. A parameter's rate multiplies the whole update, weight decay included, as if it had its own learning
    rate.
    """

    def chain() -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            config.update(),
            optax.add_decayed_weights(config.weight_decay, mask=lambda params: decayed(params, config.decay)),
            scale_by_rate(),
            optax.scale_by_learning_rate(make_schedule(schedule, config.learning_rate, steps)),
        )

    return optax.partition({"main": chain(), "auxiliary": chain()}, groups)


def scale_by_rate() -> optax.GradientTransformation:
    """Multiplies each update by the rate of its parameter; keeps no state."""

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update, rate: update if rate == 1 else update * rate, updates, rates(updates))

    return optax.stateless(scale)
