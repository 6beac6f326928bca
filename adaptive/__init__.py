"""adaptive: training language models that decide for themselves where to spend compute."""

__version__ = "0.1.0"
