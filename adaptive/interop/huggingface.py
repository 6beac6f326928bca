"""Models under the names of the transformers library, in and out, whatever their family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from adaptive.errors import CheckpointError, RecipeError
from adaptive.interop.families import Family, families
from adaptive.interop.fields import Fields
from adaptive.interop.tensors import (
    Layout,
    Place,
    born,
    built,
    check,
    checked,
    language_model_of,
    parts_of,
    taken_apart,
)
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.models import language_model
from adaptive.models.bodies import plain
from adaptive.models.language_model import LanguageModel
from adaptive.settings import leaf_values


def settings_of(family: Family, config: Mapping[str, Any]) -> language_model.Settings:
    """The model that a config.json describes. Raises RecipeError, naming the field, where there is none."""
    ours = family.settings(Fields(family.kind, config, family.defaults))
    ours.validate()
    return ours


def from_official(kind: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> LanguageModel:
    """The model with `tensors` as its parameters; see adaptive.interop.from_official.

    `config` is config.json as a dict, of any version of the library. Old checkpoints' rotary frequencies are ignored.
    A tied model may repeat its embedding as the output head, or have the head alone; a head that differs is read as one
    of its own, as the library does. While traced, two such tensors are taken to be the same, and the gradient is the
    embedding's.
    """
    family = families()[kind]
    ours, tensors = family.tidied(settings_of(family, config), tensors)
    layout = family.layout_of(ours, config)
    return built(ours, layout, checked(kind, tensors, parts_of(layout), {}))


@dataclasses.dataclass(frozen=True)
class Read:
    """Tensors that were looked at and fit; `state` makes parameters of them."""

    settings: language_model.Settings
    layout: Layout
    tensors: Mapping[str, Any]

    def state(self, shapes: Any, place: Place) -> Any:
        """The model's state, each parameter made by itself and put where `place` says; see `born`."""
        return born(shapes, self.layout, self.tensors, place)


def read(kind: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Read:
    """As `from_official`, of tensors that lie in files (`adaptive.interop.stored`): looked at one by one, not kept."""
    family = families()[kind]
    ours, tensors = family.tidied(settings_of(family, config), tensors)
    layout = family.layout_of(ours, config)
    check(kind, tensors, parts_of(layout), {})
    return Read(ours, layout, tensors)


def to_official(kind: str, model: nnx.Module) -> dict[str, jax.Array]:
    """The model's tensors f32 under the names of a published checkpoint."""
    model = language_model_of(kind, model)
    config_of(kind, model.settings)
    return taken_apart(kind, model, families()[kind].layout(model.settings))


def config_of(kind: str, settings: language_model.Settings) -> dict[str, Any]:
    """config.json of a model with these settings. Raises CheckpointError where the family has no such model."""
    family = families()[kind]
    try:
        config = family.config(settings)
        if family.lossless:
            return config
        again = _plain_form(settings_of(family, config))
    except RecipeError as error:
        raise CheckpointError(f"official {kind}: a model of this kind {error}; this one differs") from None
    ours = _plain_form(settings)
    if differs := next((path for path in {**again, **ours} if again.get(path, _NONE) != ours.get(path, _NONE)), ""):
        theirs, own = again.get(differs, "no such setting"), ours.get(differs, "none")
        raise CheckpointError(f"official {kind}: a model of this kind has {differs}={theirs}, this one has {own}")
    return config


_NONE = object()
# What changes no number that a model computes from given parameters.
_OF_TRAINING = ("init_std", "embedding_std", "body.stack.scale_residual", "body.stack.stream")


def _plain_form(settings: language_model.Settings) -> dict[str, Any]:
    """Leaves of the settings by path, with one block for each layer, and what means the same spelt the same."""
    body = settings.body
    if not isinstance(body, plain.Settings):
        raise RecipeError(f"is one stack (body=plain), not {body.kind()}")
    pattern = [dataclasses.replace(block, repeat=1) for block in body.stack.blocks for _ in range(block.repeat)]
    found = leaf_values(dataclasses.replace(settings, body=plain.Settings()))
    found = {path: value for path, value in found.items() if not path.startswith("body.")}
    for i, block in enumerate(pattern * body.stack.repeats):
        mixer = block.mixer
        if isinstance(mixer, Attention):
            mixer = dataclasses.replace(mixer, kv_heads=mixer.groups, rotary_dim=mixer.rotated)
            if not mixer.rotated:
                mixer = dataclasses.replace(mixer, rope_theta=1.0, rope_scaling=None)
            if mixer.scale:
                mixer = dataclasses.replace(mixer, scale=round(mixer.scale, 6))
            block = dataclasses.replace(block, mixer=mixer)
        found |= {f"layer {i} {path}": value for path, value in leaf_values(block).items()}
    return {path: value for path, value in found.items() if path not in _OF_TRAINING}
