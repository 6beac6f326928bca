"""What a config.json says of rotary embeddings, in and out."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from adaptive.errors import RecipeError
from adaptive.interop.fields import Fields
from adaptive.layers.rope_scalings import Scaling, dynamic, linear, llama3, yarn

# What each kind has; keys of one kind mean nothing to another, and a key that is unknown would change the model.
_USUAL = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
_KNOWN = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rotary(fields: Fields, layers: str = "") -> tuple[float, Scaling | None]:
    """(base, change of frequencies). Of the two dicts that may hold them the older, rope_scaling, comes first.

    layers  type of the layers, where the library keeps a dict for each
    """
    name = "rope_scaling" if fields.given("rope_scaling") else "rope_parameters"
    rope = fields.given(name) or {}
    fields.given("rope_scaling"), fields.given("rope_parameters"), fields.given("rope_theta")
    if not isinstance(rope, Mapping):
        raise fields.wrong(name, "must be a dict or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        if not layers:
            raise fields.wrong(
                name, "settings per layer type are not supported, only one rotary embedding for all layers"
            )
        rope = rope.get(layers) or {}
    theta = rope.get("rope_theta")
    theta = fields.get("rope_theta") if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise RecipeError(f"official {fields.kind}: rope_theta={theta!r} must be a number above 0")
    return float(theta), _scaling(fields, name, rope)


def _scaling(fields: Fields, name: str, rope: Mapping[str, Any]) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    number = functools.partial(_number, fields, name, rope)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = linear.Settings(number("factor"))
    elif kind == "dynamic":
        scaling = dynamic.Settings(number("factor"), fields.integer("max_position_embeddings"))
    elif kind == "yarn":
        scaling = _yarn(fields, rope, number)
    elif kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        scaling = llama3.Settings(number("factor"), low, high, _trained(fields, rope))
    elif kind not in ("default", None):
        raise RecipeError(
            f"official {fields.kind}: {name}.rope_type={kind!r} is not supported, only default, {', '.join(_KNOWN)}: "
            "without it the model would be another one"
        )
    known = {*_USUAL, *_KNOWN.get(kind or "", ())}
    if other := sorted(key for key in set(rope) - known if rope[key] is not None):
        raise RecipeError(f"official {fields.kind}: {name}.{other[0]}={rope[other[0]]!r} is not supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise RecipeError(f"official {fields.kind}: {name}.partial_rotary_factor is not supported, only 1.0")
    return scaling


def _yarn(fields: Fields, rope: Mapping[str, Any], number: Callable[..., float]) -> yarn.Settings:
    trained = _trained(fields, rope)
    factor = fields.integer("max_position_embeddings") / trained if rope.get("factor") is None else number("factor")
    attention = number("attention_factor", 0.0)
    if not attention and rope.get("mscale") and rope.get("mscale_all_dim"):
        one, other = (0.1 * number(key) * math.log(max(factor, 1.0)) + 1 for key in ("mscale", "mscale_all_dim"))
        attention = one / other
    truncate = bool(rope.get("truncate", True))
    return yarn.Settings(factor, trained, number("beta_fast", 32.0), number("beta_slow", 1.0), attention, truncate)


def _trained(fields: Fields, rope: Mapping[str, Any]) -> int:
    given = rope.get("original_max_position_embeddings")
    given = fields.given("original_max_position_embeddings") if given is None else given
    return int(fields.integer("max_position_embeddings") if given is None else given)


def _number(fields: Fields, name: str, rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = rope.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"official {fields.kind}: {name}.{key}={value!r}: must be a number")
    return float(value)


def rope_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The same as a config.json has it, in the spelling that every version of the library reads."""
    trained = {"max_position_embeddings": scaling.trained} if isinstance(scaling, dynamic.Settings) else {}
    return {"rope_theta": theta, "rope_scaling": None if scaling is None else _spelt(scaling)} | trained


def _spelt(scaling: Scaling) -> dict[str, Any]:
    if isinstance(scaling, linear.Settings | dynamic.Settings):
        return {"rope_type": scaling.kind(), "factor": scaling.factor}
    if isinstance(scaling, llama3.Settings):
        factors = {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        about = {"rope_type": "llama3", "factor": scaling.factor, **factors}
        return about | {"original_max_position_embeddings": scaling.trained}
    assert isinstance(scaling, yarn.Settings), f"{scaling.kind()} has no name in the library"
    about = {"rope_type": "yarn", "factor": scaling.factor, "beta_fast": scaling.fast, "beta_slow": scaling.slow}
    about |= {"original_max_position_embeddings": scaling.trained, "truncate": scaling.truncate}
    return about | ({"attention_factor": scaling.attention} if scaling.attention else {})
