"""Losses of a checkpoint against a loop over single documents, and what the command says and keeps."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation import small_runs
from flax import nnx

from adaptive import evaluate
from adaptive.data.batch import stack
from adaptive.evaluation.caches import cache_table
from adaptive.evaluation.evaluate import measure
from adaptive.evaluation.predictions import predict
from adaptive.evaluation.sets import open_sets
from adaptive.evaluation.subject import subject_of
from adaptive.evaluation.table import lines_of
from adaptive.runs.load import find, load
from adaptive.training.step import make_eval_step

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a Mixture-of-Recursions, what was loaded of it, and what evaluates it."""
    folder = tmp_path_factory.mktemp("runs") / "mor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTIVE_CACHE", str(folder / "cache"))
        small_runs.made(folder, small_runs.MOR)
        trained = load(find(folder))
        yield folder, trained, subject_of(trained)


@pytest.fixture(scope="module")
def alone(run):
    """f64[n] nats and i64[n] likeliest tokens of targets after n inputs that are a row by themselves."""
    _, trained, _ = run
    model = jax.jit(lambda s, tokens: nnx.merge(trained.graphdef, s)(tokens, selection="threshold").logits)

    def scored(tokens):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens) - 1] = tokens[:-1]
        logits = np.asarray(model(trained.state, row), np.float64)[0, : len(tokens) - 1]
        normaliser = np.log(np.exp(logits).sum(-1))
        return normaliser - logits[np.arange(len(logits)), tokens[1:]], logits.argmax(-1)

    return scored


@pytest.mark.parametrize("stride", [32, 10])
def test_every_token_is_scored_once_as_a_loop_over_documents_does(run, alone, stride):
    folder, trained, subject = run
    (data,) = open_sets([f"{folder}/texts/own.txt"], trained.recipe, trained.tokenizer, stride=stride)
    said, computed = predict(subject, data, "causal")
    nats, likeliest, targets, documents = [], [], [], []
    begin, stream = 0, trained.tokenizer.encode_documents(small_runs.TEXTS)
    for number, document in enumerate(stream):
        end, done = begin + len(document), begin + 1  # in the stream of all documents; its first token is not predicted
        for start in range(0, end, stride):
            first, last = max(start, begin), min(start + 33, end)  # of this row what is of the document
            if last - first < 2 or last <= done:
                continue
            new = slice(done - last, None)
            loss, top = alone(document[first - begin : last - begin])
            nats += [*loss[new]]
            likeliest += [*top[new]]
            targets += [*document[done - begin : last - begin]]
            documents += [number] * (last - done)
            done = last
        assert done == end
        begin = end
    np.testing.assert_array_equal(said.token, targets)
    np.testing.assert_array_equal(said.document, documents)
    np.testing.assert_allclose(said.nll, nats, rtol=2e-5)
    np.testing.assert_array_equal(said.right, np.array(likeliest) == targets)
    size = sum(len(text.encode()) - 1 for text in small_runs.TEXTS)  # nothing predicts the first byte
    assert said.size.sum() == size and len(said.nll) == size + len(stream)
    told = measure(subject, data, "causal").told
    assert told["loss"] == pytest.approx(np.mean(nats), rel=2e-5)
    text = np.array(targets) < 256  # the end of a document is no text
    assert told["bits_per_byte"] == pytest.approx(np.array(nats)[text].sum() / math.log(2) / size, rel=2e-5)
    assert told["documents"] == 12 and told["resampled"] == "documents"
    assert computed.depths.sum() == computed.read


def test_the_rule_of_training_gives_the_held_out_loss_of_training(run):
    _, trained, subject = run
    (data,) = open_sets([], trained.recipe, trained.tokenizer)
    counts = jax.tree.map(jnp.asarray, trained.tokenizer.byte_counts())
    step = jax.jit(make_eval_step(trained.graphdef, counts, selection="topk"))
    rows = [row.batch for row in data.first(0)]
    params, buffers = nnx.split_state(trained.state, nnx.Param, ...)
    outs = [step(params, buffers, stack(rows[i : i + 3]), jax.random.key(0)) for i in range(0, len(rows) - 2, 3)]
    nll, tokens = (sum(float(getattr(out, name)) for out in outs) for name in ("nll", "tokens"))
    said, _ = predict(subject, data, "train")
    assert len(said.nll) >= tokens and said.nll[: int(tokens)].sum() == pytest.approx(nll, rel=1e-5)


def test_the_command_keeps_what_it_prints(run, capsys):
    folder, _, _ = run
    sets = ("validation", f"all={folder}/texts/own.txt")
    assert evaluate.main(["--checkpoint", str(folder), "--data", *sets, "--depths", "3,2", "--resamples", "50"]) == 0
    shown = capsys.readouterr().out
    told = json.loads((folder / "evaluations" / "step-3.json").read_text())
    assert told["rules"] == ["train", "causal"] and list(told["sets"]) == ["own", "all"]
    causal = [told["sets"][name]["causal"] for name in ("own", "all")]
    assert told["macro"]["causal"]["loss"] == pytest.approx((causal[0]["loss"] + causal[1]["loss"]) / 2)
    low, high = causal[0]["loss_interval"]
    assert low < causal[0]["loss"] < high and f"{causal[0]['loss']:.4f}" in shown
    trained = told["sets"]["own"]["train"]["loss"]
    assert told["difference"]["own"]["loss"] == pytest.approx(causal[0]["loss"] - trained)
    points = told["depths"]["points"]
    assert [point["passes"] for point in points] == [2, 3]
    assert set(told["depths"]["per_set"]) == {"own", "all"} and told["depths"]["verdict"] in shown
    assert (
        points[1]["loss"] == pytest.approx(told["macro"]["causal"]["loss"]) and points[0]["loss"] != points[1]["loss"]
    )
    assert points[0]["per_set"]["own"]["compute"]["mean_depth"] <= 2
    costs = [point["per_set"]["own"]["compute"]["mflop_per_token"]["paid"] for point in points]
    assert costs[0] < costs[1] and "depth (causal selection" in shown
    arguments = ["--checkpoint", str(folder / "checkpoints" / "3"), "--rows", "1", "--resamples", "2"]
    assert evaluate.main(arguments) == 0 and (folder / "evaluations" / "step-3-2.json").exists()
    assert evaluate.main([*arguments, "--name", "step-3"]) == 2
    assert "step-3.json is there already" in capsys.readouterr().err
    assert evaluate.main(["--compare", str(folder), str(folder / "."), "--name", "step-3"]) == 0
    shown = capsys.readouterr().out
    assert f"{causal[1]['loss']:.4f} [" in shown and "2 passes, nats per token" in shown
    assert evaluate.main(["--compare", str(folder), "--name", "gone"]) == 2
    assert "no evaluation called gone; there are step-3" in capsys.readouterr().err
    assert evaluate.main(["--compare", str(folder / "texts")]) == 2
    assert "texts has no evaluation" in capsys.readouterr().err


def test_what_a_cache_costs_is_a_number(run, capsys):
    """Token by token with a cache of every pass the loss is that of the forward pass; with one of the last, another."""
    folder, trained, subject = run
    (data,) = open_sets([f"{folder}/texts/own.txt"], trained.recipe, trained.tokenizer)
    told = cache_table(trained, subject, [data], ["last"], most=6, resamples=20)
    whole = measure(subject, data, "causal", most=6).told["loss"]
    exact, last = told["points"]
    assert exact["exact"] and not last["exact"]
    assert exact["loss"] == pytest.approx(whole, rel=1e-5) and exact["difference"]["loss"] == 0
    assert last["loss"] - whole == pytest.approx(last["difference"]["loss"], abs=1e-5) and last["loss"] != whole
    one = 2 * 2 * 8 * 4 + 4  # of a pass: keys and values of 2 heads of 8, and an index
    assert exact["bytes_per_token"] - last["bytes_per_token"] == 2 * one
    lines = "\n".join(lines_of({"caches": told}))
    assert "last" in lines and "inexact" in lines and f"{last['difference']['loss']:+.4f}" in lines
