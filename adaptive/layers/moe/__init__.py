"""Mixtures of experts."""

from adaptive.layers.moe.layer import MoE, layer_from_weights

__all__ = ["MoE", "layer_from_weights"]
