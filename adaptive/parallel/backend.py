"""The platform that jax computes on: what is missing is told in a line."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

from adaptive.errors import UserError

# Parameters of glibc's mallopt (malloc.h), and values with which memory that was freed is kept for the next step.
_KEPT = {"arena max": (-8, 1), "mmap max": (-4, 0), "trim threshold": (-1, 2**31 - 1), "top pad": (-2, 2**26)}


def keep_memory() -> bool:
    """Lets the C library of a machine without accelerators keep the memory that programs of XLA free, and says whether
    it does.

    By default the buffers of each step are given back to the system and fetched again page by page, zeroed: a
    fourteenth of a step's time. It has to come before XLA makes its threads. Does nothing where the C library is not
    glibc, or where the environment sets it (MALLOC_..., GLIBC_TUNABLES).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc" or not _on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(parameter, value) for parameter, value in _KEPT.values()]
    return all(code == 1 for code in taken)


def _on_cpu() -> bool:
    """Whether jax will find CPUs alone, as far as can be told before it looks."""
    if named := os.environ.get("JAX_PLATFORMS"):
        return named == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def find_devices() -> None:
    """Lets jax look for its devices. Raises UserError, in one line, where it finds none to use."""
    import jax

    keep_memory()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where JAX_PLATFORMS=cuda and there is no GPU
        named = os.environ.get("JAX_PLATFORMS")
        why = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].removeprefix("Unable to initialize ")
        why = why.rstrip(".") or "there is no such device"
        if named:
            raise UserError(
                f"JAX_PLATFORMS={named} does not work here: {why}. Unset it to take what there is, or set it to cpu"
            ) from None
        raise UserError(f"jax cannot use the devices here: {why}. To keep to the CPU: JAX_PLATFORMS=cpu") from None
