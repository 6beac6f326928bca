"""What a run knows, put into the records that a report reads. Numpy alone, on the host."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.account import account, dense_equivalent, layer_counts, paper_flops_per_token, recursion_capacities
from adaptive.data.tokenizers import Tokenizer
from adaptive.objectives import Objective
from adaptive.training.config import Remat
from adaptive.training.report.kinds import KindCounter, begins_word
from adaptive.training.report.schema import (
    END_MARK,
    MOST_BYTES,
    SCORE_BINS,
    AccountLine,
    ChunkRecord,
    RecursionRecord,
    RoutingRecord,
    SampleRecord,
    TokenRecord,
)
from adaptive.training.report.takes import TakenCounter


def plan_costs(
    model: Any, seq_len: int, batch_size: int, remat: Remat = "none", aim: Objective | None = None
) -> dict[str, Any]:
    """The fields of a PlanRecord that follow from the model's settings and the batch: its kind, sizes, capacities and
    FLOPs."""
    active, dense, facts = account(model, seq_len), dense_equivalent(model, seq_len), model.facts()
    sizes, (unique_layers, layers) = active.parameters, layer_counts(model)
    useful = sum(stage.useful for stage in active.stages)
    ends = sizes.embedding + sizes.head + sizes.routers
    # An objective may have a model read more than the rows: all pairs of positions, or every row twice.
    readings, passed = (1, useful) if aim is None else (aim.readings, aim.forward_flops(active.stages))
    rows = batch_size * readings * passed / useful
    executed = active.train_flops(remat) * batch_size * readings * max(1.0, passed / active.forward_flops)
    lines = (
        AccountLine(a.name, a.train_useful * rows, d.train_useful * rows)
        for a, d in zip(active.stages, dense.stages, strict=True)
    )
    return {
        "family": facts.family,
        "title": facts.title,
        "router": facts.depth,
        "unique_parameters": sizes.total,
        "embedding_parameters": sizes.embedding + sizes.head,
        "effective_parameters": sizes.effective + ends,
        "unique_layers": unique_layers,
        "effective_layers": layers,
        "recursions": facts.recursions,
        "capacities": recursion_capacities(model, seq_len),
        "seq_len": seq_len,
        "tokens_per_step": seq_len * batch_size,
        "flops_per_step": active.train_flops_per_token * seq_len * rows,
        "dense_flops_per_step": dense.train_flops_per_token * seq_len * rows,
        "executed_flops_per_step": executed,
        "paper_flops_per_token": paper_flops_per_token(model, seq_len),
        "account": tuple(lines),
    }


class RoutingCounter:
    """Counts what routing did over held-out batches.

    router      kind of the depth strategy; "none" where every position takes the same path
    recursions  passes through the shared block at most
    stops       whether a pass's scores are for stopping there, not for taking it
    classes     i8[vocab] of tokens (`token_kinds.classes_of`); None: kinds are not told apart
    experts     those of the model's facts
    """

    def __init__(
        self,
        router: str,
        recursions: int,
        *,
        stops: bool = False,
        classes: np.ndarray | None = None,
        experts: Sequence[Any] = (),
    ):
        self._router, self._n, self._stops = router, recursions, stops
        self._scored = False
        self._histograms = np.zeros((recursions, 2, SCORE_BINS), np.int64)
        self._agree = np.zeros(recursions, np.int64)
        self._candidates = np.zeros(recursions, np.int64)
        self._depths = np.zeros(recursions + 1, np.int64)
        self._rows = 0
        self._chunks = ChunkCounter()
        self._classes = classes
        self._kinds = None if classes is None or router == "none" else KindCounter(classes)
        self._taken = None if classes is None or not experts else TakenCounter(classes, experts)
        self._reached: np.ndarray | float = 0.0
        self._present: np.ndarray | float = 0.0

    def add(
        self,
        depth: np.ndarray,
        scores: Sequence[np.ndarray],
        present: np.ndarray,
        boundaries: Sequence[np.ndarray] = (),
        tokens: np.ndarray | None = None,
        nll: np.ndarray | None = None,
        strongest: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """One batch.

        depth    i32[batch, seq]   passes each position took
        scores   f32[batch, seq] per recursion (Trace.scores); empty where no router ranks or stops positions
        present  bool[batch, seq]  positions that hold a token
        boundaries  bool[batch, seq] per chunking stage: where chunks begin
        tokens, nll  i32, f32[batch, seq]  ids, and nats of the token that follows each: kinds are told apart by them
        strongest    i16[calls, batch, seq] by part: the strongest expert of each token
        """
        depth, present = np.asarray(depth), np.asarray(present, bool)
        words = None
        if tokens is not None and self._classes is not None:
            words = begins_word(self._classes[tokens])
            if self._kinds is not None and nll is not None:
                self._kinds.add(tokens, depth, np.asarray(nll), present)
            if self._taken is not None:
                self._taken.add(strongest or {}, tokens, present)
        self._chunks.add(boundaries, present, words)
        self._depths += np.bincount(depth[present], minlength=self._n + 1)[: self._n + 1]
        self._rows += depth.shape[0]
        # Who can reach the last recursion: with chunks inside, positions that begin one.
        candidate = present & np.isfinite(scores[0]) if len(scores) else present
        self._reached = self._reached + ((depth == self._n) & candidate).sum(0)
        self._present = self._present + candidate.sum(0)
        self._scored = self._scored or len(scores) > 0
        for r, score in enumerate(scores):
            # A token takes pass r + 1 if it took as many in all: who left cannot come back.
            chosen = depth == r + 1 if self._stops else depth > r
            candidate = present & np.isfinite(score)
            value = np.clip(np.asarray(score)[candidate], 0.0, 1.0)
            taken = chosen[candidate]
            bins = np.minimum((value * SCORE_BINS).astype(int), SCORE_BINS - 1)
            for kind, members in enumerate((taken, ~taken)):
                self._histograms[r, kind] += np.bincount(bins[members], minlength=SCORE_BINS)
            self._agree[r] += ((value >= 0.5) == taken).sum()
            self._candidates[r] += value.size

    def scalars(self) -> dict[str, float]:
        """Columns of an evaluation's row: the dead token ratio and its value by chance; none without scores."""
        if not self._scored:
            return {}
        dead, chance = self._dead()
        return {"eval/dead_token_ratio": dead, "eval/dead_token_ratio_by_chance": chance}

    def record(
        self,
        step: int,
        selection: str,
        passage: Sequence[TokenRecord] = (),
        sample: SampleRecord | None = None,
        text: Callable[[int], str] = str,
    ) -> RoutingRecord:
        """All that was counted; text: how a token is shown."""
        routed = self._router != "none" and self._rows > 0
        dead, chance = self._dead() if self._scored else (None, None)
        return RoutingRecord(
            step=step,
            selection=selection,
            router=self._router,
            stops=self._stops,
            recursions=tuple(self._recursion(r) for r in range(self._n)) if routed else (),
            depth_counts=tuple(self._depths.tolist()),
            last_recursion_rate=tuple(np.round(self._rate(), 4).tolist()) if self._scored else (),
            rows=self._rows,
            dead_token_ratio=dead,
            dead_token_ratio_by_chance=chance,
            chunks=self._chunks.records(),
            kinds=self._kinds.records() if self._kinds is not None else (),
            experts=self._taken.records(text) if self._taken is not None else (),
            passage=tuple(passage),
            sample=sample,
        )

    def _recursion(self, r: int) -> RecursionRecord:
        selected, unselected = (tuple(h.tolist()) for h in self._histograms[r])
        judged = not self._stops and self._candidates[r] > 0
        return RecursionRecord(
            r + 1, selected, unselected, float(self._agree[r] / self._candidates[r]) if judged else None
        )

    def _rate(self) -> np.ndarray:
        return np.asarray(self._reached) / np.maximum(self._present, 1)

    def _dead(self) -> tuple[float, float]:
        """Share of positions never selected at the last recursion in any row (MoR paper, section on router design).
        Few rows leave some out by chance: (1 - share selected)^rows."""
        counted = np.asarray(self._present) > 0
        if not counted.any():
            return 0.0, 0.0
        rate = self._rate()[counted]
        chance = np.mean((1.0 - rate.mean()) ** np.asarray(self._present)[counted])
        return float(np.mean(rate == 0)), float(chance)


class ChunkCounter:
    """Lengths of chunks over held-out batches, and how many begin where words do."""

    def __init__(self) -> None:
        self._lengths: dict[int, np.ndarray] = {}
        self._sums: dict[int, np.ndarray] = {}  # of each stage: bytes, chunks
        self._words: dict[int, np.ndarray] = {}  # words, those with a chunk, chunks, those at words, positions, places

    def add(self, boundaries: Sequence[np.ndarray], present: np.ndarray, words: np.ndarray | None = None) -> None:
        """One batch: bool[batch, seq] per stage, of what exists, and of where words begin if that is known. A row's
        last chunk may be cut off by the row's end and is left out."""
        for stage, begins in enumerate(boundaries):
            begins = np.asarray(begins, bool) & present
            if words is not None:
                self._words[stage] = self._words.get(stage, 0) + _at_words(begins, present, words & present)
            row, at = np.nonzero(begins)
            whole = row[1:] == row[:-1]
            lengths = (at[1:] - at[:-1])[whole]
            counts = np.bincount(np.minimum(lengths, MOST_BYTES), minlength=MOST_BYTES + 1)[1:]
            self._lengths[stage] = self._lengths.get(stage, 0) + counts
            self._sums[stage] = self._sums.get(stage, 0) + np.array([lengths.sum(), lengths.size])

    def records(self) -> tuple[ChunkRecord, ...]:
        return tuple(self._record(stage, counts) for stage, counts in sorted(self._lengths.items()))

    def _record(self, stage: int, counts: np.ndarray) -> ChunkRecord:
        total, chunks = self._sums[stage]
        record = ChunkRecord(stage, tuple(counts.tolist()), float(total / max(1, chunks)))
        if not self._words.get(stage, np.zeros(6))[[0, 2]].all():
            return record
        words, with_chunk, begun, at_words, positions, places = map(float, self._words[stage])
        return dataclasses.replace(
            record, words=with_chunk / words, at_words=at_words / begun, chance=places / positions
        )


def _at_words(begins: np.ndarray, present: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Numbers of words, of those with a chunk, of chunks, of those at words, of positions and of places of words: a
    word's first letter and what stands before it."""
    before = np.zeros_like(words)
    before[:, :-1] = words[:, 1:]
    chunk_before = np.zeros_like(begins)
    chunk_before[:, 1:] = begins[:, :-1]
    places = words | before
    shares = (words, words & (begins | chunk_before), begins, begins & places, present, places & present)
    return np.array([share.sum() for share in shares])


def passage_tokens(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    depth: Sequence[int],
    loss: Sequence[float | None],
    stages: Sequence[tuple[Sequence[bool], Sequence[float]]] = (),
) -> tuple[TokenRecord, ...]:
    """The passage `ids` with each token's text, depth and loss (nats, as a target; None for the first).

    stages  that chunk, each (where chunks begin, probabilities of it, NaN where the stage sees no position)

    A character whose bytes are spread over several tokens is the text of the last of them.
    """
    stream = tokenizer.stream()
    records: list[TokenRecord] = []
    for i, (token, passes, nats) in enumerate(zip(ids, depth, loss, strict=True)):
        text = stream.push(int(token)) if tokenizer.token_bytes(int(token)) else END_MARK
        begins = sum(bool(mask[i]) for mask, _ in stages)
        if begins < len(stages) and records:  # bytes inside a chunk go as deep as it does
            passes = records[-1].depth
        seen = tuple(round(float(prob[i]), 3) for _, prob in stages if np.isfinite(prob[i]))
        loss_here = None if nats is None else round(float(nats), 4)
        records.append(TokenRecord(text, int(passes), loss_here, begins, seen))
    return tuple(records)
