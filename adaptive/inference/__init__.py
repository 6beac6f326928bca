"""Caches, the decode loop and samplers."""
