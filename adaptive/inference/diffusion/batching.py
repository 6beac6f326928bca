"""Continuous batching of a diffusion model: requests come and go while rows before different blocks are computed
together.

What a request is answered depends on itself alone. A row that comes makes its first call, which reads the prompt, by
itself; then it joins the others, each at its own block.
"""

import dataclasses
import time
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.inference.diffusion.caches import Cache, none
from adaptive.inference.diffusion.decoder import Decoder, Network, Rows, laid_out
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.network import Model
from adaptive.inference.diffusion.policies import Policy, threshold
from adaptive.inference.diffusion.texts import USUAL_BLOCK, usual_cache
from adaptive.inference.drawing import Drawing
from adaptive.inference.engine.desk import Desk
from adaptive.inference.engine.tickets import Ticket
from adaptive.inference.requests import Made, Reason, Request
from adaptive.runs.load import Trained
from adaptive.runs.mask_token import denoising_of


@dataclasses.dataclass(eq=False)
class _Held:
    """A ticket that has a row; at: the place of the token that is handed out next."""

    ticket: Ticket
    at: int


class Engine(Desk[_Held]):
    """Computes requests together (`adaptive.inference.requests.Engine`).

    network  the model
    mask     id that stands for what is not written yet
    rows     sequences that are computed at once
    length   tokens of a sequence at most, its prompt included
    queue    requests that may wait for a row
    block    positions of a block, which divide `length`
    policy   what a call writes; of one that goes by a schedule, one position of each row
    vocab    ids from here on are never proposed; None: all may be

    Of how a token is drawn, the temperature alone is heard. Which other tokens were likely is not told.
    """

    counted = ("prompt_tokens", "launches", "rows_computed", "positions_computed")

    def __init__(
        self,
        network: Network,
        mask: int,
        *,
        rows: int = 8,
        length: int = 1024,
        queue: int = 256,
        block: int = USUAL_BLOCK,
        policy: Policy | None = None,
        cache: Cache | None = None,
        vocab: int | None = None,
    ):
        policy = threshold.Settings() if policy is None else policy
        plan = Plan(mask, -(-length // block) * block, -(-length // block) * block, block, policy=policy, vocab=vocab)
        self._decoder = Decoder(network, plan, cache, waits=False)
        super().__init__(rows, length, queue, vocab)
        self._plan = self._decoder.plan
        dummy = [np.ones(1, np.int32)] * rows
        batch = self._decoder.started(laid_out(dummy, self._plan, self._shift, counts=[1] * rows, n=length), None)
        keys = jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32))
        idle = batch.progress._replace(block=jnp.full(rows, self._plan.blocks, jnp.int32))
        self._batch = batch._replace(progress=idle, keys=keys, heat=np.zeros(rows))
        self._start()

    @classmethod
    def of(cls, trained: Trained, **options: Any) -> Self:
        """The engine of a trained model; options of the constructor. Raises RecipeError for one of next tokens."""
        how, length = denoising_of(trained.recipe), options.setdefault("length", 1024)
        cache = options.pop("cache", None) or usual_cache(trained.recipe, length)
        network = Model(trained.graphdef, trained.state, how, cached=not isinstance(cache, none.Settings))
        longest = trained.recipe.model.positions
        if longest:
            options["length"] = min(length, longest)
        options.setdefault("vocab", trained.tokenizer.vocab_size)
        options.setdefault("block", how.block or USUAL_BLOCK)
        return cls(network, how.mask_id, cache=cache, **options)

    @property
    def _shift(self) -> int:
        return int(self._decoder.network.shifted)

    # Called by any thread

    def refuse(self, request: Request) -> str:
        if reason := super().refuse(request):
            return reason
        if (np.asarray(request.prompt) == self._plan.mask).any():
            return f"the prompt has the id {self._plan.mask}, which stands for what is not written yet"
        usual = Drawing()
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if getattr(request.how, name) != getattr(usual, name):
                return f"{name} is for models that predict the next token; of this one temperature alone is heard"
        return ""

    # The engine's own thread

    def _round(self) -> None:
        self._admit()
        self._call()

    def _admit(self) -> None:
        """Gives rows to requests that wait: their first call, alone, reads the prompt."""
        for r in range(self.rows):
            with self._changed:
                if self._held[r] is not None or not self._waiting:
                    continue
                ticket = self._waiting.popleft()
                self._held[r] = _Held(ticket, len(ticket.request.prompt))
            request = ticket.request
            prompt = np.asarray(request.prompt, np.int32)
            layout = laid_out([prompt], self._plan, self._shift, counts=[request.tokens], n=self.length)
            heat = np.array([request.how.temperature], float)
            key = jax.random.fold_in(jax.random.key(request.seed), request.stream)
            alone = self._decoder.started(layout, None)._replace(keys=key[None], heat=heat)
            after = self._decoder.call(alone)
            assert after is not None
            self._count(launches=1, prompt_tokens=len(prompt), positions_computed=int(after[1].computed.sum()))
            self._batch = self._joined(r, after[0])

    def _joined(self, r: int, one: Rows) -> Rows:
        """The rows with number r replaced by the only one of another."""
        batch = self._batch
        put = lambda a, b: a.at[r].set(b[0])  # noqa: E731
        names = ("progress", "held", "exists", "begin", "known", "keys")
        new = {name: jax.tree.map(put, getattr(batch, name), getattr(one, name)) for name in names}
        assert batch.heat is not None and one.heat is not None
        heat = batch.heat.copy()
        heat[r] = one.heat[0]
        return batch._replace(**new, heat=heat, state=self._decoder.network.put(batch.state, r, one.state))

    def _call(self) -> None:
        """Hands out what is written, and computes once more what is not."""
        begin = time.perf_counter()
        made = self._hand_out()
        if (after := self._decoder.call(self._batch)) is not None:
            self._batch, step = after
            computed = step.computed
            self._count(launches=1, rows_computed=int((computed > 0).sum()), positions_computed=int(computed.sum()))
            made += self._hand_out()
        taken = time.perf_counter() - begin
        if made and taken > 0:
            self._rate = 0.9 * self._rate + 0.1 * made / taken if self._rate else made / taken

    def _hand_out(self) -> int:
        """Gives tickets the tokens that will not change any more; how many these were."""
        progress, plan, made = self._batch.progress, self._plan, 0
        tokens, chance, block = (np.asarray(a) for a in (progress.tokens, progress.chance, progress.block))
        begin = np.asarray(self._batch.begin)
        for r, row in enumerate(self._held):
            if row is None:
                continue
            request = row.ticket.request
            stop = len(request.prompt) + request.tokens
            masked = np.flatnonzero(tokens[r, row.at : stop] == plan.mask)
            ready = row.at + int(masked[0]) if len(masked) else stop
            if plan.policy.replaces and block[r] < plan.blocks:
                open_from = int(begin[r] + (block[r] - getattr(plan.policy, "earlier", 0)) * plan.block)
                ready = min(ready, max(row.at, open_from))
            for place in range(row.at, ready):
                token = int(tokens[r, place])
                row.ticket.made.append(token)
                row.ticket.push(Made(token, float(np.log(max(chance[r, place], 1e-38))), depth=1))
                made += 1
                if token == request.end:
                    self._release(row, "end")
                    break
            else:
                row.at = max(row.at, ready)
                if row.at >= stop:
                    self._release(row, "length")
        self._count(tokens=made)
        return made

    def _release(self, row: _Held, reason: Reason) -> None:
        r = self._held.index(row)
        progress = self._batch.progress
        self._batch = self._batch._replace(
            progress=progress._replace(block=progress.block.at[r].set(self._plan.blocks)),
            held=self._batch.held.at[r].set(False),
        )
        super()._release(row, reason)
