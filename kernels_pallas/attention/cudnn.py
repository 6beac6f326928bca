"""Attention on NVIDIA GPUs by cuDNN, for what it takes exactly: rows that are a triangle or a band."""

import jax
import jax.numpy as jnp

MOST_HEAD_DIM = 128


def takes(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN is in this process and has kernels for such arrays."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= MOST_HEAD_DIM
    return half and fits and q.shape[1] == k.shape[1] and _there()


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, causal: bool) -> jax.Array:
    """As the package's `attention` for queries and keys at the same positions, without documents."""
    around = None if not window else (window - 1, 0) if causal else window - 1
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=around, implementation="cudnn")


def _there() -> bool:
    if jax.default_backend() != "gpu":
        return False  # compiling for a GPU that is elsewhere
    try:
        from jax._src.lib import cuda_versions  # what jax.nn itself asks, with an error instead of an answer

        return cuda_versions is not None and cuda_versions.cudnn_get_version() > 0
    except (ImportError, RuntimeError, AttributeError):
        return False
