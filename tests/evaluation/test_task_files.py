"""Files of tasks, and prompts and spans as CORE has them, written out by hand."""

import json
import random

import numpy as np
import pytest

from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import DataError
from adaptive.evaluation.prompts import common, examples, pair_of, prompts_of, spans_of
from adaptive.evaluation.task_files import Item, Task, read_tasks
from adaptive.evaluation.tasks import sampled

CHOICE = {"query": "The sky is", "choices": ["blue", "black", "a bird"], "gold": 0}
SCHEMA = {"context_options": ["Ann ate, so Ann", "Ann ate, so Bob"], "continuation": "was full.", "gold": 1}
LANGUAGE = {"context": " One, two, three, ", "continuation": "four"}
SHAPES = {
    "choice": ([CHOICE], "multiple_choice", ("The sky is",)),
    "schema": ([SCHEMA], "schema", tuple(SCHEMA["context_options"])),
    "language": ([LANGUAGE], "language_modeling", (" One, two, three, ",)),
    "arc": ([{"question": "Why?", "choices": ["a", "b"], "gold": 1}], "multiple_choice", ("Question: Why?\nAnswer:",)),
    "book": ([{"question_stem": "Cats eat", "choices": ["a", "b"], "gold": 1}], "multiple_choice", ("Cats eat",)),
    "piqa": ([{"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1}], "multiple_choice", ("Question: Sit\nAnswer:",)),
    "cloze": ([{"text": "He went back home"}], "language_modeling", ("He went back",)),
}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_says_by_its_keys_what_it_is(name, tmp_path):
    rows, kind, contexts = SHAPES[name]
    (task,) = read_tasks([written(tmp_path / f"{name}.jsonl", rows)])
    assert (task.name, task.kind, task.items[0].contexts) == (name, kind, contexts)
    chance = {"language_modeling": 0.0}.get(kind, 1 / max(len(contexts), len(task.items[0].continuations)))
    assert task.baseline == pytest.approx(chance) and not task.shots


BUNDLE = """icl_tasks:
- label: sky
  dataset_uri: some/sky.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: count
  dataset_uri: count.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
"""


def bundle(folder):
    (folder / "eval_data" / "some").mkdir(parents=True)
    written(folder / "eval_data" / "some" / "sky.jsonl", [CHOICE] * 4)
    written(folder / "eval_data" / "count.jsonl", [LANGUAGE] * 3)
    (folder / "core.yaml").write_text(BUNDLE)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\nsky,x,25\ncount,x,0\n")
    return folder


def test_a_bundle_says_shots_delimiters_and_chance(tmp_path):
    sky, count = read_tasks([str(bundle(tmp_path))])
    assert (sky.shots, sky.delimiter, sky.baseline, sky.core) == (2, "\nAnswer: ", 0.25, True)
    assert (count.shots, count.delimiter, count.baseline, count.kind) == (0, " ", 0.0, "language_modeling")
    assert [task.shots for task in read_tasks([str(tmp_path / "core.yaml")], shots=1)] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no items"),
        ([CHOICE, "x"], ":2: expected an object, found str"),
        ([CHOICE, {"query": "x", "gold": 0}], ":2: 'choices' is missing"),
        ([{"body": "x"}], ":1: no task has the keys body; known are context_options, continuation, gold; query"),
        ([CHOICE | {"gold": 3}], ":1: the right option is number 3, there are 3, numbered from 0"),
        ([CHOICE | {"gold": "0"}], ":1: 'gold' is '0', expected a whole number"),
        ([CHOICE | {"choices": ["a"]}], ":1: 'choices' is .* expected a list of at least two texts"),
        ([CHOICE | {"query": None}], ":1: 'query' is 'None', expected text"),
        ([{"text": "word"}], ":1: nothing to score: expected a text of at least two words"),
    ],
)
def test_malformed_files_are_told_with_their_line(rows, message, tmp_path):
    path = written(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=f"t.jsonl ?{message}"):
        read_tasks([path])


def test_other_mistakes_are_told(tmp_path):
    (tmp_path / "cut.jsonl").write_text(json.dumps(CHOICE) + '\n{"query": ')
    path = written(tmp_path / "sky.jsonl", [CHOICE] * 2)
    bundle(tmp_path)
    for given, message in (
        (["gone.jsonl"], "--tasks gone.jsonl: there is no such file"),
        ([str(tmp_path / "cut.jsonl")], "cut.jsonl:2: malformed JSON"),
        ([str(tmp_path / "eval_data" / "some"), str(tmp_path / "core.yaml")], "two tasks are called sky"),
        ([str(tmp_path / "eval_data" / "gone")], "there is no such file"),
    ):
        with pytest.raises(DataError, match=message):
            read_tasks(given)
    with pytest.raises(DataError, match="2 examples before each item need more than its 2"):
        read_tasks([path], shots=2)
    for old, new, message in (
        ("multiple_choice", "essay", "task 1, sky: icl_task_type 'essay'"),
        ("[2]", "two", "num_fewshot 'two'"),
        ("label: sky", "label: sun", "sun has no line in"),
        ("sky.jsonl", "moon.jsonl", "moon.jsonl: No such file"),
        ("- label: sky", "- label: [", "malformed YAML"),
        ("icl_tasks", "tasks", "expected a list icl_tasks"),
    ):
        (tmp_path / "core.yaml").write_text(BUNDLE.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            read_tasks([str(tmp_path / "core.yaml")])
    (tmp_path / "core.yaml").write_text(BUNDLE)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsky,many\n")
    with pytest.raises(DataError, match="csv:2: expected columns"):
        read_tasks([str(tmp_path)])


def test_prompts_are_those_of_core():
    """As the released templates render them: examples with their right option, an empty line after each."""
    shown = [Item(("The sea is",), ("red", "deep"), 1)]
    task = Task("t", "multiple_choice", (Item(("The sky is",), ("blue", "black"), 0),))
    whole = ["".join(prompt) for prompt in prompts_of(task, task.items[0], shown)]
    assert whole == ["The sea is deep\n\nThe sky is blue", "The sea is deep\n\nThe sky is black"]
    schema = Task("t", "schema", (Item(("Ann", "Bob"), ("left.",), 0),), delimiter=": ")
    whole = ["".join(prompt) for prompt in prompts_of(schema, schema.items[0], [Item(("Eve", "Tim"), ("sat.",), 1)])]
    assert whole == ["Tim: sat.\n\nAnn: left.", "Tim: sat.\n\nBob: left."]
    language = Task("t", "language_modeling", (Item((" one two ",), ("three",), 0),))
    (prompt,) = prompts_of(language, language.items[0], [Item(("a b\n",), ("c",), 0)])
    assert "".join(prompt) == "a b c\n\none two three"


def test_spans_are_those_of_core():
    tokenizer = load_tokenizer("bytes")
    text = lambda span: bytes(span.tokens[span.start :].tolist()).decode()  # noqa: E731
    task = Task("t", "multiple_choice", ())
    spans = spans_of(task, [("The sky is", " blue"), ("The sky is", " black")], tokenizer)
    assert [text(span) for span in spans] == ["ue", "ack"]  # "The sky is bl" is common
    schema = Task("t", "schema", ())
    spans = spans_of(schema, [("Ann", " left."), ("Bob", " left.")], tokenizer)
    assert [text(span) for span in spans] == [" left.", " left."]
    spans = spans_of(Task("t", "language_modeling", ()), [("one two", " three")], tokenizer)
    assert [text(span) for span in spans] == [" three"]  # the context is cut at its end, blank and all
    begun = load_tokenizer("hnet-bytes")
    assert spans_of(task, [("", "a"), ("", "b")], begun)[0].tokens.tolist() == [254, 97]
    (first, _) = spans_of(task, [("", "a"), ("", "b")], tokenizer)
    assert first.tokens.tolist() == [256, 97] and first.start == 1
    pair = pair_of("one two ", "three", tokenizer)  # the harness moves the blank
    assert text(pair) == " three"
    assert common([np.array([1, 2, 3]), np.array([1, 2])]) == 2 and common([np.array([1]), np.array([2])]) == 0


def test_examples_are_drawn_as_core_draws_them():
    items = tuple(Item((f"q{i}",), ("a", "b"), 0) for i in range(9))
    task = Task("t", "multiple_choice", items, shots=3)
    want = random.Random(1234 + 4).sample([0, 1, 2, 3, 5, 6, 7, 8], 3)
    assert examples(task, 4, 1234) == [items[i] for i in want]
    order = list(items)
    random.Random(1337).shuffle(order)
    assert sampled(task, 5).items == tuple(order[:5]) and sampled(task, 0).items == tuple(order)
