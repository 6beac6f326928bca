"""Which parameters each part of the optimizer touches, told by their paths in the model."""

from typing import Any

import jax

from adaptive.optim.config import OptimizerConfig

# Of an H-Net, the parameters with one number per head or per added channel that no other rule names.
_VECTORS = ("a_log", "dt_bias", "d", "pad", "main_pad")


def decayed(params: Any, rule: str = "matrices") -> Any:
    """True for every parameter that weight decay reaches; same tree as `params`.

    Layers are stacked on leading axes and heads have an axis of their own, so that names decide and not shapes.

    matrices  all but what is one-dimensional in one layer: the scales of norms (Mamba's gated one, [heads, dim], is
              one of them) and biases, and of an H-Net A_log, dt_bias, D and the widening vectors. The weights of
              convolutions are decayed.
    official  what the H-Net release leaves out, alone: biases, of convolutions and of the residual projection, and the
              scale of Mamba's gated norm. All other norms, A_log, dt_bias, D, the widening vectors and the embeddings
              are decayed (released code, utils/train.py, group_params).
    """
    keep = {"matrices": _is_matrix, "official": _is_decayed_by_the_release}[rule]
    return jax.tree_util.tree_map_with_path(lambda path, _: keep(names(path)), params)


def rates(params: Any, config: OptimizerConfig) -> Any:
    """Each parameter's multiple of the learning rate, float; same tree as `params`.

    A stage owns its encoder, decoder, router, residual projection and widening vector; embeddings and head belong to
    the outermost, all of the main network to the innermost (H-Net paper, section 2.3 and appendix C).
    """
    per_stage = config.stage_rates
    return jax.tree_util.tree_map_with_path(
        lambda path, _: per_stage[stage_of(names(path), len(per_stage) - 1)], params
    )


def stage_of(path: tuple[str, ...], innermost: int) -> int:
    """The stage of an H-Net that the parameter at `path` belongs to."""
    if path[0] == "stages":
        return int(path[1])
    return innermost if path[0].startswith("main") else 0


def groups(params: Any) -> Any:
    """ "auxiliary" for the parameters of auxiliary routers, "main" for all others; same tree as `params`."""
    group = lambda path, _: "auxiliary" if "aux_routers" in names(path) else "main"  # noqa: E731
    return jax.tree_util.tree_map_with_path(group, params)


def names(path: Any) -> tuple[str, ...]:
    """The path of a leaf in text, from the model down: attributes and places in lists."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return tuple(keys[:-1] if keys[-1] == "value" else keys)


def _is_matrix(path: tuple[str, ...]) -> bool:
    return not any("norm" in name or "bias" in name for name in path) and path[-1] not in _VECTORS


def _is_decayed_by_the_release(path: tuple[str, ...]) -> bool:
    bias = "bias" in path[-1] and path[-1] != "dt_bias"
    gated_norm = "mixer" in path and "norm" in path
    return not (bias or gated_norm)
