"""Which positions of each row a part computes, and where they stand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from adaptive.layers.reach import Reach
from adaptive.layers.rope import Rope, Rotary, rope_at
from adaptive.parallel.rows import take_rows
from adaptive.routing.chunks import numbered
from adaptive.routing.types import Selection


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["number", "index", "segments", "exists", "tables", "slots", "reach"],
    meta_fields=["scattered"],
)
@dataclasses.dataclass(frozen=True)
class Where:
    """A set of positions [rows, n] of each row, in ascending order.

    number    i32[rows, n]   place in the position's document: what rotary embeddings rotate by
    index     i32[rows, n]   place in the row, which orders queries and keys; with a state, of all calls so far
    segments  i32[rows, n]   documents, which nothing leaves; 0 is padding; None: one per row
    exists    bool[rows, n]  positions that exist; None: all
    tables    rotary tables by the text of their `Rotary`, which `with_tables` computes ahead
    scattered whether positions that exist may follow some that do not; otherwise they are the first of each row
    slots     i32[rows, n]   slots of a state that positions are written to, all different; out of bounds: it has none.
                             None: the slot of a position is its index
    reach     what each position sees; None: as the call says
    """

    number: jax.Array
    index: jax.Array
    segments: jax.Array | None = None
    exists: jax.Array | None = None
    tables: dict[str, Rope] = dataclasses.field(default_factory=dict)
    scattered: bool = False
    slots: jax.Array | None = None
    reach: Reach | None = None

    @staticmethod
    def whole(
        shape: tuple[int, ...],
        number: jax.Array | None = None,
        segments: jax.Array | None = None,
        exists: jax.Array | None = None,
    ) -> "Where":
        """All positions of rows of this shape [rows, n]; number None: counted from where each document begins."""
        index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return Where(numbered(shape, segments) if number is None else number, index, segments, exists)

    @staticmethod
    def after(seen: jax.Array, n: int, exists: jax.Array | None = None) -> "Where":
        """The n positions that follow `seen` i32[rows] earlier ones."""
        place = seen[:, None] + jnp.arange(n, dtype=jnp.int32)
        return Where(place, place, None, exists)

    def replace(self, **changes: Any) -> "Where":
        return dataclasses.replace(self, **changes)

    def only(self, exists: jax.Array) -> "Where":
        """The same positions, of which those of bool[rows, n] exist, wherever they stand."""
        return self.replace(exists=exists, scattered=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.number.shape[0], self.number.shape[1]

    def present(self) -> jax.Array | None:
        """bool[rows, n]: positions that hold a token; None: all."""
        if self.exists is not None or self.segments is None:
            return self.exists
        return self.segments > 0

    def counts(self) -> jax.Array:
        """i32[rows]: how many positions exist."""
        if self.exists is None:
            return jnp.full(self.number.shape[0], self.number.shape[1], jnp.int32)
        return self.exists.sum(1, dtype=jnp.int32)

    def documents(self) -> "Where":
        """The same positions, those that do not exist told by segment 0 alone."""
        if self.exists is None:
            return self
        segments = self.exists.astype(jnp.int32) if self.segments is None else self.segments
        return self.replace(segments=jnp.where(self.exists, segments, 0), exists=None)

    def take(self, indices: jax.Array, exists: jax.Array | None) -> "Where":
        """The positions at i32[rows, k], of which those exist; they themselves where these are all of them."""
        if indices.shape[1] == self.number.shape[1]:
            return self.replace(exists=exists, scattered=exists is not None)
        at = lambda a: take_rows(a, indices)  # noqa: E731
        segments = None if self.segments is None else at(self.segments)
        tables, scattered = jax.tree.map(at, self.tables), exists is not None
        slots, reach = jax.tree.map(at, (self.slots, self.reach))
        return Where(at(self.number), at(self.index), segments, exists, tables, scattered, slots, reach)

    def with_tables(self, *kinds: Rotary) -> "Where":
        """With rotary tables of these kinds, computed once for all layers and taken along by `take`."""
        return self.replace(tables=self.tables | {str(kind): self.rope(kind) for kind in kinds})

    def rope(self, rotary: Rotary) -> Rope:
        """Rotary tables at `number`."""
        known = self.tables.get(str(rotary))
        return rope_at(self.number, rotary) if known is None else known

    def selection(self) -> Selection:
        """All of these positions, where they stand in the row."""
        valid = jnp.ones(self.number.shape, bool) if self.exists is None else self.exists
        return Selection(self.index, valid.astype(jnp.float32), valid)
