"""Models of this package in lm-evaluation-harness (EleutherAI); needs the extra `lm_eval`.

    from adaptive.evaluation.lm_eval import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(load(find("runs/one"))), tasks=["piqa"])

Scores are those of `adaptive evaluate --tasks`: one scorer gives both.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from adaptive.errors import UserError
from adaptive.evaluation.prompts import Span
from adaptive.evaluation.scoring import score_spans
from adaptive.evaluation.subject import subject_of
from adaptive.inference.drawing import Drawing
from adaptive.inference.sampling import Sampler, marker_of
from adaptive.runs.load import Trained

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise UserError(
        f"{error.name} is not installed, which tasks of lm-evaluation-harness need: pip install 'adaptive-lm[lm_eval]'"
    ) from None

MOST_WRITTEN = 256  # tokens after a prompt, where a task does not say


class HarnessModel(TemplateLM):
    """A trained model as the harness asks it; routers decide as in generation."""

    def __init__(self, trained: Trained):
        super().__init__()
        self._trained, self._subject = trained, subject_of(trained)
        self._tokenizer, self._longest = trained.tokenizer, trained.recipe.data.seq_len

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token that begins documents, or else ends them."""
        begin = self._tokenizer.bos_id
        return self._tokenizer.eos_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = self._tokenizer.bos_id
        ids = self._tokenizer.encode(string).tolist()
        return ids if begin is None or add_special_tokens is False else [begin, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._scored([window for own in windows for window in own]))
        return [sum(next(scored)[0] for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if reason := self._trained.refuse_generation:
            raise UserError(f"{self._trained.recipe.name} cannot generate: {reason}")
        return [self._written(*request.args) for request in requests]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text in rows, every token of it once."""
        ids = self.tok_encode(text, add_special_tokens=False)
        rows = get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
        return [make_disjoint_window(row) for row in rows]

    def _scored(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        spans = []
        for context, continuation in pairs:
            before = context or [self.eot_token_id]
            spans.append(Span(np.array([*before, *continuation], np.int32), len(before)))
        return [
            (-float(one.nll.sum(dtype=np.float64)), bool(one.right.all())) for one in score_spans(self._subject, spans)
        ]

    def _written(self, context: str, how: dict[str, Any]) -> str:
        """What the model writes after a context, up to the first of the texts that are to end it."""
        until = how.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        most = int(how.get("max_gen_toks", MOST_WRITTEN))
        temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
        sampler = Sampler(
            self._trained.graphdef,
            self._trained.state,
            how=Drawing(temperature),
            vocab=self._tokenizer.vocab_size,
            end=self._tokenizer.eos_id,
            marker=marker_of(self._trained.recipe, self._tokenizer),
        )
        ids = np.array(self.tok_encode(context) or [self.eot_token_id], np.int32)[-self._longest :]
        text, written = "", []
        for piece in sampler([ids], most, jax.random.key(0)):
            if piece.prompt:
                continue
            written += piece.tokens[0][piece.valid[0]].tolist()
            text = self._tokenizer.decode(written)
            if any(end in text for end in ends):
                break
        return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def run_tasks(trained: Trained, tasks: Sequence[str], folder: str = "", shots: int | None = None, most: int = 0) -> Any:
    """The harness's results for tasks by name, as JSON.

    folder  of task files; its tasks alone are known then, and nothing is fetched. "": the harness's own, which it
            fetches from the Hugging Face hub
    most    items of each task (0: all)

    Raises UserError for a task that is not known.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder or None, include_defaults=not folder)
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        where = f"{folder} has {', '.join(sorted(known)) or 'none'}" if folder else "lm-eval ls tasks lists them"
        raise UserError(f"--harness: there is no task {unknown[0]}; {where}")
    found = lm_eval.simple_evaluate(
        HarnessModel(trained), tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=most or None,
        bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    return {name: {key: value for key, value in one.items() if _plain(value)} for name, one in found["results"].items()}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value == value
