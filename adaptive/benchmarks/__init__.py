"""Benchmarks of single operations and layers: ratios within one run, against a named baseline."""
