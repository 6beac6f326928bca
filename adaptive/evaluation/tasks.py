"""Tasks of a model: what share of items it gets right, above chance and with an interval."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive.evaluation import bootstrap
from adaptive.evaluation.evaluate import Say
from adaptive.evaluation.prompts import Span, examples, pair_of, prompts_of, spans_of
from adaptive.evaluation.scoring import Scored, score_spans
from adaptive.evaluation.subject import Subject
from adaptive.evaluation.task_files import Item, Task

SEEDS = (1234, 2345, 3456)  # of the examples before each item
_ORDER = 1337  # of the items, before only some are taken
CORE_TASKS = 22


class Answer(NamedTuple):
    """Of one item: whether each way of choosing has it right (NaN where a kind has no such way), the nats and tokens of
    the right continuation, and whether anything of it was cut.

    right          as CORE chooses: the least nats per token; of a continuation, every token the likeliest
    likelihood     least nats (lm-evaluation-harness: acc)
    per_character  least nats per character of the choice (acc_norm)
    information    by how much the context raises the likelihood (acc_mutual_info)
    """

    right: float
    likelihood: float
    per_character: float
    information: float
    nats: float
    tokens: int
    cut: bool


def evaluate_tasks(
    subject: Subject,
    tasks: Sequence[Task],
    *,
    seeds: Sequence[int] = SEEDS,
    most: int = 0,
    resamples: int = bootstrap.RESAMPLES,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Every task, and the mean over them of what is above chance; JSON.

    seeds  of the examples; one alone where a task has no examples
    most   items of each task (0: all)
    """
    out: dict[str, Any] = {}
    centred: list[tuple[float, np.ndarray | None]] = []
    for task in tasks:
        say(f"{task.name}, {task.kind}, {task.shots} shots")
        taken = sampled(task, most)
        answers = [answered(subject, taken, seed) for seed in (seeds if task.shots else seeds[:1])]
        right = np.mean([[answer.right for answer in of_seed] for of_seed in answers], axis=0)
        drawn = bootstrap.means(right, 0, resamples)
        above = lambda share, b=task.baseline: (share - b) / (1 - b)  # noqa: E731
        centred.append((float(above(right.mean())), None if drawn is None else above(drawn)))
        out[task.name] = {
            **_about(taken, answers, seeds),
            "accuracy": float(right.mean()),
            "accuracy_interval": bootstrap.interval(drawn),
            "baseline": task.baseline,
            "centred": centred[-1][0],
            "centred_interval": bootstrap.interval(centred[-1][1]),
        }
    resampled = [drawn for _, drawn in centred if drawn is not None]
    known = len(resampled) == len(tasks)
    mean = {
        "tasks": len(tasks),
        "centred": float(np.mean([value for value, _ in centred])),
        "centred_interval": bootstrap.interval(np.mean(resampled, axis=0) if known else None),
        "core": sum(task.core for task in tasks) == CORE_TASKS == len(tasks) and not most,
    }
    return {"tasks": out, "tasks_mean": mean}


def sampled(task: Task, most: int) -> Task:
    """The task with its items in CORE's order, and at most so many (0: all)."""
    items = list(task.items)
    random.Random(_ORDER).shuffle(items)
    return dataclasses.replace(task, items=tuple(items[:most] if most else items))


def answered(subject: Subject, task: Task, seed: int) -> list[Answer]:
    """Every item with the examples that the seed gives it."""
    prompts = [prompts_of(task, item, examples(task, i, seed)) for i, item in enumerate(task.items)]
    tokenizer = subject.tokenizer
    core = [spans_of(task, own, tokenizer) for own in prompts]
    pairs = [[pair_of(*prompt, tokenizer) for prompt in own] for own in prompts]
    alone = [
        [pair_of("", continuation, tokenizer) for _, continuation in own] if task.kind == "multiple_choice" else []
        for own in prompts
    ]
    # CORE and the harness score parts of one text, which is computed once.
    joined = [_both(a, b) for own, others in zip(core, pairs, strict=True) for a, b in zip(own, others, strict=True)]
    scored = iter(score_spans(subject, [*joined, *itertools.chain(*alone)]))
    whole = [list(itertools.islice(scored, len(own))) for own in core]
    bare = [list(itertools.islice(scored, len(own))) for own in alone]
    each = zip(task.items, core, pairs, whole, bare, strict=True)
    return [_answer(task, item, a, b, scores, without) for item, a, b, scores, without in each]


def _both(a: Span, b: Span) -> Span:
    """What has the scored ends of both; they may differ in a token that stands in front."""
    tokens = max(a.tokens, b.tokens, key=len)
    return Span(tokens, len(tokens) - max(len(a.tokens) - a.start, len(b.tokens) - b.start))


def _answer(
    task: Task, item: Item, core: list[Span], pairs: list[Span], whole: list[Scored], alone: list[Scored]
) -> Answer:
    own = [_last(one.nll, len(span.tokens) - span.start) for one, span in zip(whole, core, strict=True)]
    cut = any(one.cut for one in whole)
    right = own[item.gold if len(own) > 1 else 0]
    nats, tokens = float(right.sum(dtype=np.float64)), len(right)
    if task.kind == "language_modeling":
        written = bool(_last(whole[0].right, len(core[0].tokens) - core[0].start).all())
        return Answer(float(written), math.nan, math.nan, math.nan, nats, tokens, cut)
    means = [float(np.mean(part, dtype=np.float64)) if len(part) else math.nan for part in own]
    sums = np.array(
        [
            _last(one.nll, len(span.tokens) - span.start).sum(dtype=np.float64)
            for one, span in zip(whole, pairs, strict=True)
        ]
    )
    hit = lambda losses: float(int(np.argmin(losses)) == item.gold)  # noqa: E731
    first = means.index(min(means))
    if task.kind == "schema":
        return Answer(float(first == item.gold), hit(sums), math.nan, math.nan, nats, tokens, cut)
    characters = np.array([len(choice) for choice in item.continuations])
    gain = sums - np.array([one.nll.sum(dtype=np.float64) for one in alone])
    return Answer(float(first == item.gold), hit(sums), hit(sums / characters), hit(gain), nats, tokens, cut)


def _last(values: np.ndarray, count: int) -> np.ndarray:
    """The last so many, or all where there are fewer."""
    return values[max(0, len(values) - count) :]


def _about(task: Task, answers: Sequence[Sequence[Answer]], seeds: Sequence[int]) -> dict[str, Any]:
    every = [answer for of_seed in answers for answer in of_seed]
    mean = lambda name: _finite(np.mean([getattr(answer, name) for answer in every]))  # noqa: E731
    nats, tokens = sum(answer.nats for answer in every), sum(answer.tokens for answer in every)
    return {
        "kind": task.kind,
        "items": len(task.items),
        "shots": task.shots,
        "seeds": list(seeds[: len(answers)]),
        "by_seed": [float(np.mean([answer.right for answer in of_seed])) for of_seed in answers],
        "likelihood": mean("likelihood"),
        "per_character": mean("per_character"),
        "mutual_information": mean("information"),
        "nats_per_token": nats / tokens if tokens else None,
        "cut": sum(answer.cut for answer in answers[0]),
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
