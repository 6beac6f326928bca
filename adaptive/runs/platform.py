"""What depends on the machine of a run: where compiled programs are kept, and what layers compute in."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from adaptive.recipe import Recipe


def keep_compilations() -> Path:
    """Turns on jax's persistent compilation cache, by default in the user's cache folder of this machine; its path.

    JAX_COMPILATION_CACHE_DIR moves it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "adaptive" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_raise_persistent_cache_errors", False)
    return folder


def compute_dtype(recipe: Recipe) -> jnp.dtype:
    """What layers compute in: as the recipe says, or bfloat16 on accelerators and float32 on CPU."""
    if recipe.train.compute_dtype != "auto":
        return jnp.dtype(recipe.train.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
