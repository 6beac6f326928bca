"""What an operation is promised of values, not of shapes, looked at where ADAPTIVE_CHECKS is set: for finding a fault.

A program is made with the checks or without them; nothing of them is in a program without.
"""

import os

import jax
import numpy as np


def checking() -> bool:
    return os.environ.get("ADAPTIVE_CHECKS", "") not in ("", "0")


def require(holds: jax.Array, message: str) -> None:
    """Raises ValueError with the message unless bool[] `holds`; in a compiled program, where it is found while it runs,
    jax.errors.JaxRuntimeError that carries it."""
    if isinstance(holds, jax.core.Tracer):
        jax.debug.callback(_raise_unless, holds, message=message)
    else:
        _raise_unless(holds, message=message)


def _raise_unless(holds: np.ndarray | jax.Array, *, message: str) -> None:
    if not holds:
        raise ValueError(message)
