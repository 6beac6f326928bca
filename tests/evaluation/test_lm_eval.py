"""lm-evaluation-harness gives the numbers that our own scorer gives."""

import itertools
import json

import numpy as np
import pytest
from evaluation import small_runs

from adaptive import evaluate
from adaptive.evaluation.subject import subject_of
from adaptive.evaluation.task_files import read_tasks
from adaptive.evaluation.tasks import evaluate_tasks
from adaptive.runs.load import find, load

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here: pip install 'adaptive-lm[lm_eval]'")

pytestmark = pytest.mark.compiles
WORDS = ("whale", "ship", "sea", "harpoon", "a", "Ahab, captain", "oil", "wind", "mast", "crew of it")
CHOICES = """task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_mutual_info}}]
"""
PAGES = """task: own_page
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/page.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """task: own_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/page.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{page}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["."], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parametrize("tokenizer", ["bytes", "hnet-bytes"])
def test_results_are_those_of_our_scorer(tokenizer, tmp_path, monkeypatch):
    from adaptive.evaluation.lm_eval import HarnessModel, run_tasks

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    run = tmp_path / "run"
    small_runs.made(run, small_runs.MOR, f"data.tokenizer={tokenizer}", seq=64)
    trained = load(find(run))
    rows = [{"query": f"{a} and the {b} of", "choices": [a, b, "x" + a], "gold": i % 3}
            for i, (a, b) in enumerate(itertools.pairwise(WORDS))]  # fmt: skip
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pages = ["Call me Ishmael. " * 7, "a"]
    (tmp_path / "page.jsonl").write_text("\n".join(json.dumps({"page": page}) for page in pages))
    for name, text in (("choice", CHOICES), ("page", PAGES), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    found = run_tasks(trained, ["own_choice", "own_page", "own_writing"], str(tmp_path))
    ours = evaluate_tasks(subject_of(trained), read_tasks([str(tmp_path / "choice.jsonl")]))["tasks"]["choice"]
    assert found["own_choice"]["acc,none"] == pytest.approx(ours["likelihood"])
    assert found["own_choice"]["acc_norm,none"] == pytest.approx(ours["per_character"])
    assert found["own_choice"]["acc_mutual_info,none"] == pytest.approx(ours["mutual_information"])
    model = HarnessModel(trained)
    ids = [model.prefix_token_id, *pages[1].encode()]
    (whole,) = model._scored([(ids[:1], ids[1:])])
    nats = sum(-model._scored([window])[0][0] for window in model._windows(pages[0])) - whole[0]
    size = sum(len(page) for page in pages)
    assert found["own_page"]["bits_per_byte,none"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert found["own_writing"]["exact_match,none"] == 0


def test_the_command_runs_tasks_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    small_runs.made(tmp_path / "run", small_runs.PLAIN, seq=64)
    row = {"query": "The sky is", "choices": ["blue", "black"], "gold": 1}
    (tmp_path / "choice.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    (tmp_path / "choice.yaml").write_text(CHOICES.format(folder=tmp_path))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--harness_tasks", str(tmp_path), "--harness"]
    assert evaluate.main([*arguments, "own_choice"]) == 0
    assert "own_choice" in capsys.readouterr().out
    told = json.loads((tmp_path / "run" / "evaluations" / "step-3.json").read_text())
    assert told["harness"]["own_choice"]["acc,none"] in (0, 1) and "sets" not in told
    assert evaluate.main([*arguments, "gone"]) == 2
    assert "there is no task gone" in capsys.readouterr().err
