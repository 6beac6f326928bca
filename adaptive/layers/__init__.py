"""Layers: each an nnx.Module, none knows a model."""
