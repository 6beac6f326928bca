"""Programs that compute some rows at a time: of a recursion one pass of its core, of rows before different passes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptive.inference.engine.slots import CORE, DONE, Programs, Slots, Told, here_, moved, picked, ranked, waiting
from adaptive.models.steps import Steps


class Picked(Programs):
    """Tokens that stop cost nothing more: a pass computes those alone that take it, and a turn those that have taken
    all.

    batch   rows of the largest turn and pass
    replay  i32[k]: passes that tokens take, in place of what their router says: number i of seed s takes
            replay[(s + i) mod k]; for measurements that do not depend on what is generated
    """

    def __init__(
        self, graphdef: nnx.GraphDef, state: Any, *, batch: int, replay: np.ndarray | None = None, **options: Any
    ):
        super().__init__(graphdef, state, **options)
        self.passes = Steps(nnx.merge(graphdef, state)).passes
        self._replay = replay
        sizes = tuple(sorted({1, max(1, batch // 4), batch}))
        self.turns, self.batches = sizes, sizes if self.passes else ()
        self._once = jax.jit(here_(self._pass), static_argnames=("count",), donate_argnames=("slots",))

    def once(self, slots: Slots, keep: np.ndarray, count: int) -> tuple[Slots, Told]:
        return self._once(self._state, keep, slots=slots, count=count)

    def _items(self, model: Any, rows: int) -> Any:
        return Steps(model).nothing(rows)

    def _entered(self, model: Any, slots: Slots, rows: jax.Array, tokens: jax.Array, exists: jax.Array) -> Slots:
        if not self.passes:
            return super()._entered(model, slots, rows, tokens, exists)
        item, cache = Steps(model).enter(tokens, slots.cache, rows, exists)
        slots = moved(slots._replace(cache=cache), rows, exists, item=item, passes=0, phase=CORE)
        return ranked(slots, rows, exists)

    def _pass(self, state: Any, keep: Any, *, slots: Slots, count: int) -> tuple[Slots, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = picked(slots, CORE, count)
        r = slots.passes[rows]
        item = jax.tree.map(lambda a: a[rows], slots.item)
        item, goes, cache = Steps(model).once(r, item, slots.cache, rows, exists)
        if self._replay is not None:
            place = (slots.seed[rows] + slots.number[rows].astype(jnp.uint32)) % len(self._replay)
            goes = r + 1 < jnp.asarray(self._replay, jnp.int32)[place]
        slots = moved(
            slots._replace(cache=cache), rows, exists, item=item, passes=r + 1, phase=jnp.where(goes, CORE, DONE)
        )
        slots = ranked(slots, rows, exists & ~goes)  # survivors stay at the head
        return slots, Told(waiting(slots), rows, exists, None, None, None)

    def _turn(self, state: Any, keep: Any, given: Any, *, slots: Slots, count: int, most: int) -> tuple[Slots, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = picked(slots, DONE, count)
        steps = Steps(model)
        if self.passes:
            item, depth = jax.tree.map(lambda a: a[rows], slots.item), slots.passes[rows]
            logits, cache = steps.leave(item, slots.cache, rows, exists)
        else:
            depth = jnp.ones(count, jnp.int32)
            logits, cache = steps.through(slots.token[rows], slots.cache, rows, exists)
        told = depth, jnp.zeros((0, count), bool)
        return self._moved_on(model, slots._replace(cache=cache), rows, exists, logits, told, most)
