"""A batch as micro-batches."""

import jax

from adaptive.parallel.rules import batch_shards, constrain


def dealt(a: jax.Array, n: int) -> jax.Array:
    """[batch, ...] -> [n, batch / n, ...]; every device's rows are dealt to all micro-batches, so none move."""
    shards = batch_shards()
    parts = a.reshape(shards, n, a.shape[0] // (shards * n), *a.shape[1:]).swapaxes(0, 1)
    parts = parts.reshape(n, -1, *a.shape[1:])
    return constrain(parts, *(None, "batch", "seq", *(None,) * (parts.ndim - 3))[: parts.ndim])


def collected(a: jax.Array) -> jax.Array:
    """The way back of `dealt`."""
    shards, (n, rows) = batch_shards(), a.shape[:2]
    whole = a.reshape(n, shards, rows // shards, *a.shape[2:]).swapaxes(0, 1).reshape(n * rows, *a.shape[2:])
    return constrain(whole, *("batch", "seq", *(None,) * (whole.ndim - 2))[: whole.ndim])
