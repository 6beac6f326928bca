"""What of a row each device of the context axis holds: neighbouring positions outside attention, chunks that balance a
causal triangle inside.

Zig-zag (Llama 3, section 3.3.2): of 2 n chunks device r has chunks r and 2n - 1 - r, so that with the keys of any one
device each has as many pairs of a query and an earlier key.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Shard = jax.Array | int


@dataclasses.dataclass(frozen=True)
class Layout:
    """`parts` devices, each with a chunk of neighbours or, `zigzag`, with an early chunk and a late one."""

    parts: int
    zigzag: bool

    @property
    def held(self) -> int:
        """Chunks of a device."""
        return 1 + self.zigzag

    def chunks(self, shard: Shard) -> tuple[Shard, ...]:
        """The numbers of a device's chunks, ascending."""
        return (shard, 2 * self.parts - 1 - shard) if self.zigzag else (shard,)

    def own(self, x: jax.Array, shard: Shard, axis: int = 1) -> jax.Array:
        """What a device has of an array of whole rows, along `axis`."""
        size = x.shape[axis] // (self.held * self.parts)
        cut = [lax.dynamic_slice_in_dim(x, c * size, size, axis) for c in self.chunks(shard)]
        return cut[0] if len(cut) == 1 else jnp.concatenate(cut, axis)

    def slot(self, place: jax.Array, shard: Shard, length: int) -> jax.Array:
        """How many of a device's `length` positions lie before a place i32[...] of the row: an interval of the row is
        an interval of these."""
        size = length // self.held
        return sum((jnp.clip(place - c * size, 0, size) for c in self.chunks(shard)), jnp.zeros_like(place))


def exchanged(tree: Any, layout: Layout, axis: str, *, back: bool = False) -> Any:
    """Arrays [batch, length, ...] in whose places those of the zig-zag layout come, or `back`; two permutations each,
    none where the layout has neighbours as they are."""
    if not layout.zigzag:
        return tree
    move = _back if back else _there
    return jax.tree.map(lambda x: move(x, layout.parts, axis), tree)


def _there(x: jax.Array, parts: int, axis: str) -> jax.Array:
    early, late = jnp.split(x, 2, axis=1)
    even = moved(early, axis, ((i, _owner(2 * i, parts)) for i in range(parts)))
    odd = moved(late, axis, ((i, _owner(2 * i + 1, parts)) for i in range(parts)))
    return _by_parity(even, odd, axis)


def _back(x: jax.Array, parts: int, axis: str) -> jax.Array:
    early, late = jnp.split(x, 2, axis=1)
    even, odd = jnp.split(_by_parity(early, late, axis), 2, axis=1)
    early = moved(even, axis, ((_owner(2 * i, parts), i) for i in range(parts)))
    late = moved(odd, axis, ((_owner(2 * i + 1, parts), i) for i in range(parts)))
    return jnp.concatenate([early, late], axis=1)


def _owner(chunk: int, parts: int) -> int:
    return min(chunk, 2 * parts - 1 - chunk)


def _by_parity(a: jax.Array, b: jax.Array, axis: str) -> jax.Array:
    """Both, the second first on devices of odd number: these have an odd chunk and then an even one."""
    even = lax.axis_index(axis) % 2 == 0
    return jnp.concatenate([jnp.where(even, a, b), jnp.where(even, b, a)], axis=1)


def moved(tree: Any, axis: str, pairs: Iterable[tuple[int, int]]) -> Any:
    """Every array as the device that sends to this one has it; zeros where none does. Nothing is sent if all stay."""
    pairs = [*pairs]
    if all(a == b for a, b in pairs):
        return tree
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)
