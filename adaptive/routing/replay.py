"""What routers decided, to be decided again: choices by position, whatever shapes they were made in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.routing.boundaries import gather
from adaptive.routing.types import Selection

BITS = 32


class Replay(NamedTuple):
    """Decisions about tokens [rows, n]; those about a chunk stand at the token that it begins with.

    chunks   bool[stages, rows, n]   where a chunk of each stage of an H-Net begins, from the tokens inwards
    passes   bool[passes, rows, n]   who took each pass of a recursion; None: no router decides
    experts  u32[layers, words, rows, n] of each body, from the outermost inwards: the choices of each layer of the
             unrolled network as bits, zero experts behind the true ones; None: it has none
    """

    chunks: Any
    passes: Any
    experts: tuple[Any, ...]

    def inside(self, selection: Selection) -> "Replay":
        """As the network inside the first chunking stage has it, on the chunks that `selection` holds."""

        def at(a: jax.Array) -> jax.Array:
            flat = a.reshape(-1, *a.shape[-2:])
            own = jax.vmap(lambda one: gather(one, selection.indices))(flat)
            own = jnp.where(selection.valid, own, jnp.zeros((), own.dtype))
            return own.reshape(*a.shape[:-2], *selection.valid.shape)

        passes = None if self.passes is None else at(self.passes)
        return Replay(at(self.chunks[1:]), passes, tuple(None if a is None else at(a) for a in self.experts[1:]))

    def behind(self, layers: int) -> "Replay":
        """Without the first layers of the outermost body."""
        own, *inner = self.experts
        return self._replace(experts=(None if own is None else own[layers:], *inner))

    def joined(self, shape: tuple[int, int]) -> "Replay":
        """With all tokens in other rows."""
        return jax.tree.map(lambda a: a.reshape(*a.shape[:-2], *shape), self)


def together(parts: list[Replay], valid: list[np.ndarray]) -> Replay:
    """One for all of each row's tokens, of parts that follow one another: bool[rows, n] says which of their tokens
    exist. Rows are as long as the longest, and what follows a shorter one was decided about nothing."""
    exists = np.concatenate(valid, axis=1)
    counts = exists.sum(1)

    def one(*arrays: Any) -> np.ndarray:
        whole = np.concatenate([np.asarray(a) for a in arrays], axis=-1)
        out = np.zeros((*whole.shape[:-1], int(counts.max())), whole.dtype)
        for r, n in enumerate(counts):
            out[..., r, :n] = whole[..., r, exists[r]]
        return out

    return jax.tree.map(one, *parts)


def packed(mask: jax.Array) -> dict[str, jax.Array]:
    """Choices bool[rows, n, choices] as arrays u32[rows, n] by name, 32 of them a bit each."""
    choices = mask.shape[-1]
    words = -(-choices // BITS)
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, words * BITS - choices))).reshape(*mask.shape[:2], words, BITS)
    bits = (padded.astype(jnp.uint32) << jnp.arange(BITS, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return {f"chosen_{i:03}": bits[..., i] for i in range(words)}


def unpacked(words: jax.Array, choices: int) -> jax.Array:
    """bool[rows, n, choices] of u32[words, rows, n]."""
    number = jnp.arange(choices, dtype=jnp.uint32)
    of = jnp.moveaxis(words, 0, -1)[..., number // BITS]
    return (of >> (number % BITS)) & 1 > 0
