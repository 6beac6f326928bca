"""Routing, the heart: scores -> Selection -> gather and combine; losses, capacities, thresholds, statistics."""
