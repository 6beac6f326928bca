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
    all. Of few rows all passes and the turn are one launch, which ends when the last has taken its last.

    batch   rows of the largest turn and pass
    replay  i32[k]: passes that tokens take, in place of what their router says: number i of seed s takes
            replay[(s + i) mod k]; for measurements that do not depend on what is generated
    """

    def __init__(
        self, graphdef: nnx.GraphDef, state: Any, *, batch: int, replay: np.ndarray | None = None, **options: Any
    ):
        super().__init__(graphdef, state, **options)
        self.passes = Steps(nnx.merge(graphdef, state)).passes
        self._replay = None if replay is None else np.asarray(replay, np.int32)
        few = max(1, batch // 4)
        if self.passes:
            self.turns = self.batches = tuple(sorted({batch // 2, batch})) if batch > 4 else (batch,)
            self.tokens = tuple(sorted({1, few}))
        else:
            self.turns = tuple(sorted({1, few, batch}))
        names: dict[str, Any] = {"static_argnames": ("count",), "donate_argnames": ("slots",)}
        self._once = jax.jit(here_(self._pass), **names)
        names["static_argnames"] = ("count", "most")
        self._throughs = jax.jit(here_(self._through), **names)

    def once(self, slots: Slots, keep: np.ndarray, count: int) -> tuple[Slots, Told]:
        return self._once(self._state, self._replay, keep, slots=slots, count=count)

    def token(self, slots: Slots, keep: np.ndarray, count: int, most: int) -> tuple[Slots, Told]:
        return self._throughs(self._state, self._replay, keep, slots=slots, count=count, most=most)

    def once_lowered(self, slots: Slots, keep: Any, count: int) -> jax.stages.Lowered:
        """The program of a pass, of shapes."""
        return self._once.lower(self._state, self._replay, keep, slots=slots, count=count)

    def turn_lowered(self, slots: Slots, keep: Any, count: int) -> jax.stages.Lowered:
        """The program of a turn, of shapes."""
        return self._turns.lower(self._state, keep, None, slots=slots, count=count, most=0)

    def _items(self, model: Any, rows: int) -> Any:
        return Steps(model).nothing(rows)

    def _entered(self, model: Any, slots: Slots, rows: jax.Array, tokens: jax.Array, exists: jax.Array) -> Slots:
        if not self.passes:
            return super()._entered(model, slots, rows, tokens, exists)
        item, cache = Steps(model).enter(tokens, slots.cache, rows, exists)
        slots = moved(slots._replace(cache=cache), rows, exists, item=item, passes=0, phase=CORE)
        return ranked(slots, rows, exists)

    def _pass(self, state: Any, replay: Any, keep: Any, *, slots: Slots, count: int) -> tuple[Slots, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = picked(slots, CORE, count)
        slots = self._passed(model, replay, slots, rows, exists)
        slots = ranked(slots, rows, slots.phase[rows] == DONE)  # survivors stay at the head
        return slots, Told(waiting(slots), rows, exists, None, None, None)

    def _passed(self, model: Any, replay: Any, slots: Slots, rows: jax.Array, exists: jax.Array) -> Slots:
        """The slots after another pass of rows i32[n], of those that exist."""
        r = slots.passes[rows]
        item = jax.tree.map(lambda a: a[rows], slots.item)
        item, goes, cache = Steps(model).once(r, item, slots.cache, rows, exists)
        if replay is not None:
            place = (slots.seed[rows, 0] + slots.number[rows].astype(jnp.uint32)) % len(replay)
            goes = r + 1 < replay[place]
        phase = jnp.where(goes, CORE, DONE)
        return moved(slots._replace(cache=cache), rows, exists, item=item, passes=r + 1, phase=phase)

    def _turn(self, state: Any, keep: Any, given: Any, *, slots: Slots, count: int, most: int) -> tuple[Slots, Told]:
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = picked(slots, DONE, count)
        return self._turned(model, slots, rows, exists, most)

    def _turned(self, model: Any, slots: Slots, rows: jax.Array, exists: jax.Array, most: int) -> tuple[Slots, Told]:
        steps = Steps(model)
        if self.passes:
            item, depth = jax.tree.map(lambda a: a[rows], slots.item), slots.passes[rows]
            logits, cache = steps.leave(item, slots.cache, rows, exists)
        else:
            depth = jnp.ones(len(rows), jnp.int32)
            logits, cache = steps.through(slots.token[rows], slots.cache, rows, exists)
        told = depth, jnp.zeros((0, len(rows)), bool)
        return self._moved_on(model, slots._replace(cache=cache), rows, exists, logits, told, most)

    def _through(
        self, state: Any, replay: Any, keep: Any, *, slots: Slots, count: int, most: int
    ) -> tuple[Slots, Told]:
        """All passes that `count` rows have before them, and their turn."""
        model, slots = nnx.merge(self._graphdef, state), slots.kept(keep)
        rows, exists = picked(slots, None, count)

        def going(slots: Slots) -> jax.Array:
            return (exists & (slots.phase[rows] == CORE)).any()

        def once(slots: Slots) -> Slots:
            return self._passed(model, replay, slots, rows, exists & (slots.phase[rows] == CORE))

        slots = jax.lax.while_loop(going, once, slots)
        return self._turned(model, slots, rows, exists, most)
