"""Chunks by the similarity of neighbours, with noise in training.

ConceptMoE paper, sections on chunking and on noise.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.layers.chunkers import ChunkerModule, Heard, dynamic
from adaptive.layers.site import normal_param
from adaptive.routing.boundaries import Boundaries
from adaptive.settings import ranged


@dataclasses.dataclass(frozen=True)
class Settings(dynamic.Settings):
    """As dynamic chunking, from projections that start at random, a chunk where p >= 1/2."""

    flip_temperature: float = ranged(6.0, least=0)  # tau, of the sharpening of the noise; 0: none

    def build(self, width: int, std: float, key: jax.Array) -> ChunkerModule:
        return Similarity(width, self.flip_temperature, std, key)


class Similarity(dynamic.Dynamic):
    """In training chunks are drawn at random from sharpened probabilities, without which p gathers at one half."""

    def __init__(self, width: int, temperature: float, std: float, key: jax.Array):
        self.q, self.k = (normal_param(k, (width, width), (None, None), std) for k in jax.random.split(key))
        self.temperature = temperature

    def __call__(self, heard: Heard) -> Boundaries:
        prob = jnp.where(heard.first, 1.0, self.probability(heard))
        if heard.key is None or not self.temperature:
            return Boundaries(prob, prob >= 0.5)
        root = 1 / self.temperature
        sharp = jnp.where(prob >= 0.5, prob**root, 1 - (1 - prob) ** root)
        drawn = jax.random.uniform(heard.key, prob.shape, prob.dtype) < jax.lax.stop_gradient(sharp)
        return Boundaries(prob, drawn | heard.first)
