"""Answers to tasks, against one forward pass for each option."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from evaluation import small_runs
from flax import nnx

from adaptive import evaluate
from adaptive.evaluation.prompts import Span, prompts_of
from adaptive.evaluation.scoring import score_spans
from adaptive.evaluation.subject import subject_of
from adaptive.evaluation.task_files import Item, Task
from adaptive.evaluation.tasks import evaluate_tasks, sampled
from adaptive.runs.load import find, load

pytestmark = pytest.mark.compiles
WORDS = ("whale", "ship", "sea", "harpoon", "a", "Ahab, captain", "oil", "wind")
ITEMS = tuple(
    Item((f"{a} and the {b} of",), (a, b, "x" + a), i % 3) for i, (a, b) in enumerate(itertools.pairwise(WORDS))
)
CHOICE = Task("choice", "multiple_choice", ITEMS, baseline=1 / 3)
SCHEMA = Task("schema", "schema", tuple(Item((f"{a} is", f"{a} had"), ("there.",), i % 2) for i, a in enumerate(WORDS)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mor"
    small_runs.made(folder, small_runs.MOR, seq=64)
    trained = load(find(folder))
    model = jax.jit(lambda s, tokens: nnx.merge(trained.graphdef, s)(tokens, selection="threshold").logits)

    def nats(text):
        """f64[n], bool[n]: of each byte of a text given those before, one row alone; the first counts for nothing."""
        row = np.zeros((1, 64), np.int32)
        tokens = list(text.encode())
        row[0, : len(tokens) - 1] = tokens[:-1]
        logits = np.asarray(model(trained.state, row), np.float64)[0, : len(tokens) - 1]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), tokens[1:]]
        return np.append(np.nan, losses), np.append(False, logits.argmax(-1) == tokens[1:])

    return folder, subject_of(trained), nats


def test_choices_are_scored_by_nats_per_token_and_as_the_harness_does(run):
    _, subject, nats = run
    told = evaluate_tasks(subject, [CHOICE])["tasks"]["choice"]
    core, likelihood, per_character = [], [], []
    for item in sampled(CHOICE, 0).items:
        prompts = ["".join(prompt) for prompt in prompts_of(CHOICE, item)]
        same = next(i for i in range(99) if len({prompt[: i + 1] for prompt in prompts}) > 1)
        losses = [nats(prompt)[0] for prompt in prompts]
        core.append(np.argmin([loss[same:].mean() for loss in losses]) == item.gold)
        sums = np.array([loss[len(item.contexts[0]) :].sum() for loss in losses])
        likelihood.append(np.argmin(sums) == item.gold)
        per_character.append(np.argmin(sums / [len(choice) for choice in item.continuations]) == item.gold)
    assert told["accuracy"] == pytest.approx(np.mean(core)) and told["items"] == 7
    assert told["likelihood"] == pytest.approx(np.mean(likelihood))
    assert told["per_character"] == pytest.approx(np.mean(per_character))
    assert told["centred"] == pytest.approx((np.mean(core) - 1 / 3) / (1 - 1 / 3))
    assert told["seeds"] == [1234] and told["cut"] == 0


def test_schemas_and_continuations(run):
    _, subject, nats = run
    greedy = "whale "
    for _ in range(3):  # what the model would write, where it can be read
        greedy += next((chr(c) for c in range(32, 127) if nats(greedy + chr(c))[1][-1]), "?")
    items = (Item((greedy[:5],), (greedy[6:],), 0), Item(("whale",), ("zq",), 0))
    language = Task("language", "language_modeling", items)
    told = evaluate_tasks(subject, [SCHEMA, language], seeds=(1, 2))["tasks"]
    right = []
    for item in SCHEMA.items:
        losses = [nats("".join(prompt))[0] for prompt in prompts_of(SCHEMA, item)]
        right.append(np.argmin([loss[-len(" there.") :].mean() for loss in losses]) == item.gold)
    assert told["schema"]["accuracy"] == pytest.approx(np.mean(right))
    want = [nats(f"{item.contexts[0]} {item.continuations[0]}")[1][len(item.contexts[0]) :].all() for item in items]
    assert told["language"]["accuracy"] == pytest.approx(np.mean(want))


def test_a_score_depends_on_nothing_else_in_the_batch(run):
    _, subject, nats = run
    texts = ["a whale " * n for n in (1, 3, 8, 4)] + ["b"]
    spans = [Span(np.frombuffer(text.encode() + b"s", np.uint8).astype(np.int32), 1) for text in texts]
    together = score_spans(subject, spans)
    for span, scored, text in zip(spans, together, texts, strict=True):
        (alone,) = score_spans(subject, [span])
        np.testing.assert_array_equal(scored.nll, alone.nll)
        (fewer,) = score_spans(dataclasses.replace(subject, rows=1), [span])
        np.testing.assert_allclose(scored.nll, fewer.nll, rtol=1e-5)
        np.testing.assert_allclose(scored.nll[-40:], nats((text + "s")[-65:])[0][1:][-40:], rtol=2e-4, atol=1e-4)
        assert scored.cut == (len(text) > 64) and len(scored.nll) == min(len(text), 64)


def test_few_shots_average_over_seeds_and_the_command_tells(run, tmp_path, capsys):
    folder, _, _ = run
    rows = [{"query": i.contexts[0], "choices": i.continuations, "gold": i.gold} for i in ITEMS]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--checkpoint", str(folder), "--tasks", str(path), "--shots", "1", "--items", "5", "--name", "own"]
    assert evaluate.main([*arguments, "--seeds", "7,8"]) == 0
    told = json.loads((folder / "evaluations" / "own.json").read_text())
    task = told["tasks"]["own"]
    assert task["seeds"] == [7, 8] and len(task["by_seed"]) == 2 and task["items"] == 5 and task["shots"] == 1
    assert task["accuracy"] == pytest.approx(np.mean(task["by_seed"])) and "sets" not in told
    assert told["tasks_mean"]["centred"] == pytest.approx(task["centred"]) and not told["tasks_mean"]["core"]
    assert "own" in capsys.readouterr().out
