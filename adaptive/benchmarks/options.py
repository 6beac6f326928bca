"""Options that the benchmarks of operations share."""

import argparse

import jax
import jax.numpy as jnp

from adaptive import command
from adaptive.command import number


def options(name: str, about: str, repeats: int, what: str = "how often each way is measured") -> command.Options:
    """Those of `adaptive bench NAME`, with --repeats, by default so many; what: they are, in its help."""
    made = command.Options(f"bench {name}", about)
    made.add_argument("--repeats", type=number(int, least=1), default=repeats, help=f"{what} (default {repeats})")
    return made


def add_dtype(made: command.Options) -> None:
    """Lets the command take --dtype, which `dtype_of` returns."""
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, else bfloat16")


def dtype_of(given: argparse.Namespace) -> jnp.dtype:
    return jnp.dtype(given.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
