"""Families of other people's models, under the names that the transformers library gives them. One file each, found by
its name, with a `FAMILY`: which configuration is which settings, and which tensor which parameter, both ways."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from adaptive.errors import RecipeError
from adaptive.interop.fields import Fields
from adaptive.interop.tensors import Layout
from adaptive.models import language_model
from adaptive.settings import nearest


class Family:
    """architecture  the library's class, as config.json has it under `architectures`
    model_type    as config.json has it
    kind          the file's name; set where families are found
    defaults      of fields that a config.json leaves out
    """

    kind: str = ""
    lossless: bool = False  # whether its configurations hold settings as they are
    architecture: str = ""
    model_type: str = ""
    defaults: Mapping[str, Any] = {}

    def settings(self, fields: Fields) -> language_model.Settings:
        """The model that a configuration describes; RecipeError, naming the field, where there is none."""
        raise NotImplementedError

    def config(self, settings: language_model.Settings) -> dict[str, Any]:
        """A configuration of a model with these settings, as far as the family has names for them: read again it gives
        the same settings exactly where the family has such models. RecipeError where nothing fits."""
        raise NotImplementedError

    def layout(self, settings: language_model.Settings) -> Layout:
        """Where each parameter lies among the tensors."""
        raise NotImplementedError

    def layout_of(self, settings: language_model.Settings, config: Mapping[str, Any]) -> Layout:
        """The same of a checkpoint with this configuration."""
        return self.layout(settings)

    def tidied(
        self, settings: language_model.Settings, tensors: Mapping[str, Any]
    ) -> tuple[language_model.Settings, dict[str, Any]]:
        """The settings with what the tensors themselves decide, and the tensors under their usual names, without what
        is no parameter."""
        return settings, dict(tensors)


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its kind."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        family.kind = module.name
        found[module.name] = family
    return found


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind of a config.json, by its architecture or, without one, its model_type.

    Raises RecipeError for one that is unknown, with those that are known.
    """
    known = {family.architecture: kind for kind, family in families().items()}
    types = {family.model_type: kind for kind, family in families().items()}
    names = config.get("architectures")
    if isinstance(names, list) and names:
        if names[0] in known:
            return known[names[0]]
        near = nearest(str(names[0]), known, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise RecipeError(f"the architecture {names[0]} is not known here, known: {', '.join(known)}{hint}")
    if config.get("model_type") in types:
        return types[config["model_type"]]
    raise RecipeError(
        f"the configuration names no architecture that is known here ({', '.join(known)}), and model_type="
        f"{config.get('model_type')!r} is none of {', '.join(types)}: say --kind"
    )
