"""The configuration of the released H-Net code (configs/*.json, models/config_hnet.py), read as ours and written."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from adaptive.errors import RecipeError
from adaptive.layers.layout import parse_layout
from adaptive.models.config import TransformerConfig
from adaptive.models.hnet_config import HNetConfig

# Official name -> ours, and the value where it is left out (None: it may not be).
_TOP: dict[str, Any] = {
    "arch_layout": None, "d_model": None, "d_intermediate": None, "vocab_size": None, "ssm_cfg": {}, "attn_cfg": None,
    "tie_embeddings": False, "ratio_targets": (),
}  # fmt: skip
_SSM = {
    "d_conv": ("d_conv", 4), "expand": ("expand", 2), "d_state": ("d_state", 128), "chunk_size": ("ssm_block", 256),
    "headdim": ("ssm_head_dim", 64),
}  # fmt: skip
_ATTENTION = {"num_heads": "heads", "rotary_emb_dim": "rotary_dims", "window_size": "windows"}
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0  # of the release, which no configuration sets


def config_from_official(config: Mapping[str, Any]) -> TransformerConfig:
    """The model that an official configuration describes, without limits on chunks.

    Beyond the release, ssm_cfg may have `headdim` (64 there), and `ratio_targets` may say what the ratio loss of each
    stage pulls to; without it the paper's: 6 for one stage, 3 for each of several. Raises RecipeError, naming the key,
    for what is missing, unknown or of the wrong type.
    """
    _known(config, _TOP, "")
    layout = parse_layout(config["arch_layout"], where="official config: arch_layout")
    if layout.house:
        raise RecipeError("official config: arch_layout: the release knows no network 'model'; give blocks, as in T22")
    stages = layout.stages + 1
    ssm, attention = (_section(config, name) for name in ("ssm_cfg", "attn_cfg"))
    _known(ssm, _SSM, "ssm_cfg.")
    _known(attention, _ATTENTION, "attn_cfg.")
    per_stage: dict[str, Any] = {
        "widths": _integers(config["d_model"], stages, "d_model", low=1),
        "intermediates": _integers(config["d_intermediate"], stages, "d_intermediate", low=0),
    }
    for name, field in _ATTENTION.items():
        if name not in attention:
            raise RecipeError(f"official config: attn_cfg.{name} is missing")
        per_stage[field] = _integers(attention[name], stages, f"attn_cfg.{name}", low=-1)
    # Stages without attention have been seen with zeros here.
    per_stage["heads"] = tuple(max(1, heads) for heads in per_stage["heads"])
    for name, (field, usual) in _SSM.items():
        value = ssm.get(name, usual)
        listed = value if isinstance(value, list | tuple) else [value]
        per_stage[field] = _integers(listed, stages if len(listed) > 1 else 1, f"ssm_cfg.{name}", low=1)
    ours = TransformerConfig(
        vocab_size=_integers([config["vocab_size"]], 1, "vocab_size", low=1)[0],
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        tie_embeddings=bool(config.get("tie_embeddings", False)),
        hnet=HNetConfig(
            layout=json.dumps(config["arch_layout"]),
            ratio_targets=_targets(config.get("ratio_targets") or (), layout.stages),
            **per_stage,
        ),
    )
    ours.validate()
    return ours


def config_to_official(config: TransformerConfig) -> dict[str, Any]:
    """The official configuration of a model; `headdim` is in it only where it is not the release's 64."""
    hnet = config.hnet
    stages = range(hnet.stages + 1)
    shapes = [hnet.shape(stage) for stage in stages]

    def scalar_or_list(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    ssm = {
        "chunk_size": [s.ssm_block for s in shapes],
        "d_conv": [s.d_conv for s in shapes],
        "d_state": [s.d_state for s in shapes],
        "expand": [s.expand for s in shapes],
    }
    if any(s.ssm_head_dim != _SSM["headdim"][1] for s in shapes):
        ssm["headdim"] = [s.ssm_head_dim for s in shapes]
    return {
        "arch_layout": json.loads(hnet.layout),
        "d_model": [s.width for s in shapes],
        "d_intermediate": [s.intermediate for s in shapes],
        "vocab_size": config.vocab_size,
        "ssm_cfg": {name: scalar_or_list(values) for name, values in ssm.items()},
        "attn_cfg": {
            "num_heads": [s.heads for s in shapes],
            "rotary_emb_dim": [s.rotary_dim for s in shapes],
            "window_size": [s.window for s in shapes],
        },
        "tie_embeddings": config.tie_embeddings,
    }


def _known(values: Mapping[str, Any], names: Mapping[str, Any], path: str) -> None:
    if unknown := next((key for key in values if key not in names), None):
        near = difflib.get_close_matches(str(unknown), names, n=1)
        raise RecipeError(
            f"official config: {path}{unknown} is unknown{f'; did you mean {near[0]}?' if near else ''} "
            f"Known: {', '.join(names)}"
        )
    if missing := next((key for key, usual in names.items() if usual is None and key not in values), None):
        raise RecipeError(f"official config: {path}{missing} is missing")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    values = config.get(name, {})
    if not isinstance(values, Mapping):
        raise RecipeError(f"official config: {name} must be a dict of settings, not {values!r}")
    return values


def _integers(values: Any, count: int, name: str, *, low: int) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise RecipeError(
            f"official config: {name}={values!r} must be a list of {count} integers, one for each stage of arch_layout"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise RecipeError(f"official config: {name} has {value!r}; it must be integers of at least {low}")
    return tuple(values)


def _targets(values: Any, stages: int) -> tuple[float, ...]:
    if not values:
        return (6.0,) if stages <= 1 else (3.0,) * stages
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError):
        found = ()
    if len(found) != stages:
        raise RecipeError(
            f"official config: ratio_targets={values!r} must be a list of {stages} numbers, one per chunking stage"
        )
    return found
