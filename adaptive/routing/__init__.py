"""Routing, the heart: scores -> Selection -> gather and combine; losses, capacities, thresholds, statistics."""


def runs_on(platform: str) -> str:
    """What computes it on a platform ("cpu", "gpu", "tpu"), and why."""
    return "gather, scatter and top-k of XLA: there is no kernel yet"
