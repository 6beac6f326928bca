"""The way tests compile: `jax.jit`, made quick by the flags of conftest.py."""

import jax

OPTIONS = None
jit = jax.jit
