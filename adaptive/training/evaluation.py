"""Held-out loss under every way of selecting, and what routing did."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from adaptive.data.pipeline import Batch, Data
from adaptive.data.token_kinds import classes_of
from adaptive.data.words import row_marker
from adaptive.runs.state import TrainState
from adaptive.training.metrics import chunk_sizes
from adaptive.training.parts import PartSums
from adaptive.training.program import Program, data_shard
from adaptive.training.report.collect import RoutingCounter, passage_tokens
from adaptive.training.report.schema import TokenRecord
from adaptive.training.sets_and_tasks import SetsAndTasks

Row = dict[str, Any]


class Evaluator:
    """Evaluates a state on the recipe's held-out rows.

    Models whose routers choose among tokens, or drop some, are evaluated as they train ("topk", which may see the whole
    sequence) and as they generate ("threshold", which is causal); others select alike in both and are evaluated once.
    """

    def __init__(self, program: Program, data: Data):
        recipe = program.recipe
        self._recipe, self._data, self._facts = recipe, data, program.facts
        self._share, self._shares = data_shard(program.mesh)
        wanted = [mode for mode in recipe.eval.selection if mode in program.selections]
        modes = wanted if len(program.selections) > 1 else ("topk",)
        counts = data.tokenizer.byte_counts()
        self.selection = modes[0]  # how the passage and the counted routing are selected
        self._others = SetsAndTasks(program, data.tokenizer)
        self.compiled = False  # whether all programs are
        self._steps = {mode: program.eval_step(counts, mode) for mode in modes}  # type: ignore[arg-type]

    @functools.cached_property
    def _classes(self) -> np.ndarray | None:
        """Of every token, where kinds are told apart. It takes a while, so not before the first evaluation."""
        facts = self._facts
        shown = facts.depth != "none" or bool(facts.chunking or facts.experts)
        return classes_of(self._data.tokenizer) if shown else None

    def __call__(self, state: TrainState, go_on: Callable[[], None] | None = None) -> tuple[Row, RoutingCounter]:
        """(columns "eval/..." of a metrics row, what routing did under the first way of selecting).

        go_on  called before each batch, and raises where the evaluation is to be given up
        """
        facts = self._facts
        row: Row = {}
        first = None
        draws = self._recipe.eval.draws if self._recipe.objective.noisy else 1
        runs = [(mode, "eval/" if mode == self.selection else f"eval/{mode}/", state) for mode in self._steps]
        if jax.tree.leaves(state.ema):
            runs.append((self.selection, "eval/ema/", state._replace(params=state.ema)))
        for mode, prefix, evaluated in runs:
            step = self._steps[mode]
            counter = RoutingCounter(
                facts.depth, facts.recursions, stops=facts.stops, classes=self._classes, experts=facts.experts
            )
            tokens = text = 0.0
            nll = np.zeros(draws)
            weights: list[int] = []
            scalars: list[dict[str, float]] = []
            parts = PartSums(facts.experts)
            for draw, number, batch in self._batches(draws):
                if go_on:
                    go_on()
                out = jax.device_get(step(evaluated, batch, number, draw))
                nll[draw] += out.nll
                tokens, text = tokens + float(out.tokens) / draws, text + float(out.bytes) / draws
                present = self._everywhere(batch.segment_ids) > 0
                boundaries = [stage.mask for stage in out.stages]
                ids = self._everywhere(batch.tokens)
                nats = None if self._recipe.objective.noisy else out.token_nll  # those of tokens that follow
                counter.add(out.depth, out.scores, present, boundaries, ids, nats, out.experts)
                weights.append(int(present.sum()))
                scalars.append(out.scalars)
                parts.add(out.told)
            if not tokens:
                continue
            row |= {f"{prefix}{name}": value for name, value in losses(nll, tokens, text).items()}
            for name in scalars[0]:
                row[f"{prefix}{name}"] = float(np.average([s[name] for s in scalars], weights=weights))
            row |= chunk_sizes(row, prefix)
            row |= {f"{prefix}{name}": value for name, value in parts.columns().items()}
            if first is None:
                first = counter
                row |= counter.scalars()
        if go_on:
            go_on()
        row |= self._others(state)
        self.compiled = True
        return row, first or RoutingCounter("none", 1)

    def _batches(self, draws: int) -> Iterator[tuple[int, int, Batch]]:
        """(number of the draw, number of the batch, batch) of all held-out rows, as often as there are draws."""
        for draw in range(draws):
            for number, batch in enumerate(self._data.validation(self._recipe.eval.rows)):
                yield draw, number, batch

    def passage(self, state: TrainState) -> tuple[TokenRecord, ...]:
        """The beginning of the held-out text, each token's depth, loss and chunks under the first way of selecting;
        nothing where the objective has noise."""
        ids = np.asarray(self._data.validation_passage(self._recipe.data.seq_len + 1))
        seq = self._recipe.data.seq_len
        if len(ids) < seq + 1 or self._recipe.objective.noisy:  # most losses of such are of tokens that are shown
            return ()
        rows = self._recipe.train.batch_size // self._shares
        ones = np.ones(seq, np.int32)
        tokens = ids.astype(np.int32)
        row = Batch(tokens[:-1], tokens[1:], np.arange(seq, dtype=np.int32), ones, ones.astype(np.float32))
        row = row_marker(self._recipe.data.boundaries, self._data.tokenizer)(row)
        batch = jax.tree.map(lambda a: np.broadcast_to(a, (rows, seq)), row)
        out = jax.device_get(self._steps[self.selection](state, batch, 0))
        losses: list[float | None] = [None, *map(float, out.token_nll[0, :-1])]
        stages = [(stage.mask[0], stage.prob[0]) for stage in out.stages]
        return passage_tokens(self._data.tokenizer, ids[:-1].tolist(), out.depth[0].tolist(), losses, stages)

    def _everywhere(self, local: np.ndarray) -> np.ndarray:
        """The rows of all shares, as `Evaluation` holds them; several processes may feed the same share."""
        if jax.process_count() == 1:
            return local
        from jax.experimental import multihost_utils

        shares, rows = multihost_utils.process_allgather((np.array(self._share), local))
        _, first = np.unique(shares, return_index=True)
        return np.asarray(rows)[first].reshape(-1, *local.shape[1:])


def losses(nll: np.ndarray, tokens: float, size: float) -> Row:
    """Columns of the held-out loss: its mean over draws of noise and, of several, the standard error of that.

    nll     f64[draws]: nats of all targets, by each draw
    tokens  targets; size: bytes that they stand for
    """
    found: Row = {"loss": float(nll.mean()) / tokens}
    if size:
        found["bits_per_byte"] = float(nll.mean()) / math.log(2) / size
    if (draws := len(nll)) > 1:
        error = float(nll.std(ddof=1)) / draws**0.5
        found |= {"draws": draws, "loss_error": error / tokens}
        found |= {"bits_per_byte_error": error / math.log(2) / size} if size else {}
    return found
