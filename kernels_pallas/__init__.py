"""Kernels, one folder per operation. Imports nothing from `adaptive`."""
