"""What depends on the machine of a run: where compiled programs are kept, and what layers compute in."""

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.caches import cache_folder, can_be_written
from adaptive.parallel.backend import find_devices
from adaptive.paths import is_address
from adaptive.recipe import Recipe


def keep_compilations() -> str:
    """Turns on jax's persistent compilation cache, by default in the user's cache folder of this machine. Returns, in
    words, where programs are kept.

    JAX_COMPILATION_CACHE_DIR moves it, also to an address that jax knows (gs://). Raises UserError where the user has
    no folder that can be written.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_raise_persistent_cache_errors", False)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        _share_compilations()
    if not is_address(folder) and not can_be_written(Path(folder)):
        # Else jax warns at every program.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
        return f"not kept: {folder} cannot be written"
    return f"kept in {folder}"


class CacheHits:
    """Counts the programs that this process reads from the compilation cache; `with` it, until its end."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "CacheHits":
        jax.monitoring.register_event_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._hear)

    def _hear(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


def _share_compilations() -> None:
    """Makes what process 0 compiled the compilation of all: they run one program, and process 0 alone writes the cache.

    On CPUs jax mixes into the key a fingerprint that differs between processes of one machine; here it is the kind of
    machine. A version of jax that computes the key in another way keeps its own.
    """
    from jax._src import cache_key

    def kind_of_machine(hasher: Any, devices: Any) -> None:
        hasher.update(f"{len(devices.flat)} {platform.machine()} {_cpu()}".encode())

    if hasattr(cache_key, "_hash_accelerator_config"):
        cache_key._hash_accelerator_config = kind_of_machine  # type: ignore[assignment]


def _cpu() -> str:
    """What code for this machine may use, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def start_backend() -> None:
    """Starts the platform that jax computes on. Raises UserError, in one line, where it cannot.

    JAX_ENABLE_X64 is switched off, with a line: kernels of accelerators compute in 32 bits and less alone.
    """
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        print("JAX_ENABLE_X64 is switched off: numbers have 32 bits here, or less", file=sys.stderr)
        jax.config.update("jax_enable_x64", False)
    find_devices()


def compute_dtype(recipe: Recipe) -> jnp.dtype:
    """What layers compute in: as the recipe says, or bfloat16 on accelerators and float32 on CPU."""
    if recipe.train.compute_dtype != "auto":
        return jnp.dtype(recipe.train.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
