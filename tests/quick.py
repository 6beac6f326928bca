"""Programs that a test runs once or twice: machine code is not optimised, which halves the time to compile it.

The programs themselves are the same. Where a test looks at the compiled program, `jax.jit` shows what a user gets.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": "0"}


def jit(function=None, **options):
    """`jax.jit` without optimised machine code; with options alone, a decorator."""
    if function is None:
        return functools.partial(jit, **options)
    return jax.jit(function, compiler_options=OPTIONS, **options)
