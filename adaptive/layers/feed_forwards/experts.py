"""A mixture of experts: several feed-forwards, and a router that decides which of them compute a token."""

import dataclasses

import jax

from adaptive.layers.moe.base import RoutedLayer
from adaptive.layers.moe.layer import routed_layer
from adaptive.layers.moe.routers import token_choice
from adaptive.layers.moe.settings import MoESettings, RouterSettings
from adaptive.layers.site import Site


@dataclasses.dataclass(frozen=True)
class Settings(MoESettings):
    """Experts in place of a feed-forward, and the router that assigns tokens to them."""

    router: RouterSettings = token_choice.Settings()

    def build(self, site: Site, key: jax.Array) -> RoutedLayer:
        return routed_layer(self, site, key)
