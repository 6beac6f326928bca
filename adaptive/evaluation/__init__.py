"""Honest numbers of a model: losses by set, depth and kind of token with intervals, and tasks."""
