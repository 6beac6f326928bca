"""Prompts of tasks, and which of their tokens are scored; as CORE has them (DCLM; nanochat's core_eval.py)."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive.data.tokenizers import Tokenizer
from adaptive.evaluation.task_files import Item, Task


class Span(NamedTuple):
    """tokens i32[n], of which those from `start` on, at least 1, are scored."""

    tokens: np.ndarray
    start: int


def examples(task: Task, index: int, seed: int) -> list[Item]:
    """The items before item `index`: others, drawn with a generator of the seed and the index."""
    others = [i for i in range(len(task.items)) if i != index]
    return [task.items[i] for i in random.Random(seed + index).sample(others, task.shots)] if task.shots else []


def prompts_of(task: Task, item: Item, shown: Sequence[Item] = ()) -> list[tuple[str, str]]:
    """(context, continuation with its delimiter) of each option, the examples before the context."""
    trim = str.strip if task.kind == "language_modeling" else str
    one = lambda own, gold: trim(own.contexts[gold % len(own.contexts)])  # noqa: E731
    before = "".join(
        f"{one(own, own.gold)}{task.delimiter}{own.continuations[own.gold % len(own.continuations)]}\n\n"
        for own in shown
    )
    options = max(len(item.contexts), len(item.continuations))
    return [
        (before + one(item, i), task.delimiter + item.continuations[i % len(item.continuations)])
        for i in range(options)
    ]


def spans_of(task: Task, prompts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Span]:
    """The tokens of each option and where CORE begins to score.

    multiple_choice    after the tokens that all options begin with
    schema             the tokens that all options end with
    language_modeling  after the tokens of the context
    """
    whole = [_begun(tokenizer.encode(context + continuation), tokenizer) for context, continuation in prompts]
    if task.kind == "multiple_choice":
        starts = [common(whole)] * len(whole)
    elif task.kind == "schema":
        same = common([tokens[::-1] for tokens in whole])
        starts = [len(tokens) - same for tokens in whole]
    else:
        context = _begun(tokenizer.encode((prompts[0][0] + task.delimiter).strip()), tokenizer)
        starts = [common([context, whole[0]])]
    return [scored_from(tokens, start, tokenizer) for tokens, start in zip(whole, starts, strict=True)]


def pair_of(context: str, continuation: str, tokenizer: Tokenizer) -> Span:
    """A context and its continuation, split as lm-evaluation-harness does: white space at the end of the context
    belongs to the continuation."""
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    whole = _begun(tokenizer.encode(context + continuation), tokenizer)
    return scored_from(whole, len(_begun(tokenizer.encode(context), tokenizer)), tokenizer)


def scored_from(tokens: np.ndarray, start: int, tokenizer: Tokenizer) -> Span:
    """A span; where nothing is before what is scored, the token that ends documents is."""
    if start:
        return Span(tokens, start)
    return Span(np.concatenate([np.array([tokenizer.eos_id], np.int32), tokens]), 1)


def _begun(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """With the token that begins documents, where the tokenizer's convention has one."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(begin, np.int32), tokens])


def common(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    same = np.all([tokens[:shortest] == sequences[0][:shortest] for tokens in sequences], axis=0)
    return int(shortest if same.all() else np.argmin(same))
