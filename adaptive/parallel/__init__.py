"""Mesh, logical axis rules and the collectives' one wrapper."""
