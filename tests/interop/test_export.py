"""Models as folders for the transformers library: what is written, what is refused, what is read back."""

import dataclasses
import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import shapes
from flax import nnx

from adaptive import exporting
from adaptive.data.tokenizer_export import tokenizer_files
from adaptive.data.tokenizers import load_tokenizer
from adaptive.errors import CheckpointError, UserError
from adaptive.interop import custom, export, from_official
from adaptive.interop.export import About, planned
from adaptive.interop.families import families
from adaptive.interop.files import read_tensors
from adaptive.recipe import list_recipes, load

ABOUT = About(64, None, 256, {"tokenizer.json": "{}"}, "# A model\n")


def built(settings):
    """The model with parameters that are all random, so that no router is undecided and no bias is zero."""
    graphdef, state = nnx.split(settings.build(jax.random.key(0)))
    rng = np.random.default_rng(0)
    drawn = lambda a: a if a.ndim == 0 else np.asarray(a + 0.05 * rng.standard_normal(a.shape), np.float32)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(drawn, state))


@pytest.mark.compiles
def test_a_folder_reads_back_as_the_same_model(tmp_path):
    """tests/test_convert.py writes a family of the library."""
    settings = shapes.mor(5)
    model, plan = built(settings), planned(settings)
    off = export.export(tmp_path / "out", model, plan, ABOUT, dtype="bfloat16", shard_bytes=20_000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "out")
    assert 0 < off < 0.5 and config["torch_dtype"] == "bfloat16" and config["max_position_embeddings"] == 64
    assert "model.layers.1.block.0.self_attn.q_proj.weight" in tensors
    assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    again = from_official("adaptive", tensors, config)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        want = np.asarray(leaf[...]).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(dict(nnx.to_flat_state(nnx.state(again)))[path][...], want)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == set(export.MODELING)
    with pytest.raises(CheckpointError, match="holds files already"):
        export.export(tmp_path / "out", model, plan, ABOUT)


@pytest.mark.compiles
def test_what_does_not_read_back_is_told(tmp_path, monkeypatch):
    model = built(shapes.plain(1))
    whole = export._write_weights
    changed = lambda folder, tensors, *rest: whole(folder, {n: v * 1.5 for n, v in tensors.items()}, *rest)  # noqa: E731
    monkeypatch.setattr(export, "_write_weights", changed)
    with pytest.raises(CheckpointError, match="does not read back as the same model: logits differ by"):
        export.export(tmp_path / "out", model, planned(shapes.plain(1)), ABOUT)


def test_every_recipe_is_written_or_refused_with_the_reason():
    given = {name: load(name) for name in list_recipes()}
    models = {name: recipe.model.at_step(-1) for name, recipe in given.items() if recipe.objective.causal}
    refused = {name: why for name, model in models.items() if (why := custom.refused(model))}
    assert set(refused) == {"hnet_words_tiny"}
    with pytest.raises(CheckpointError, match="no model in PyTorch is written of this one: it has no chunker=words"):
        planned(load("hnet_words_tiny").model)


def test_kinds_without_such_a_model_are_refused():
    with pytest.raises(CheckpointError, match="official llama: a model of this kind is one stack"):
        planned(shapes.mor(5), "llama")
    with pytest.raises(CheckpointError, match="--kind hnet: a folder is written of"):
        planned(shapes.plain(1), "hnet")


@pytest.mark.parametrize("name", ["bytes", "hnet-bytes", "bpe-4096"])
def test_tokenizers_are_written_as_they_encode(tmp_path, name):
    tokenizer = load_tokenizer(name)
    for file, text in tokenizer_files(tokenizer).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    again = load_tokenizer(str(tmp_path))
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in ("The cat sat.\n  12", "é漢😀<|endoftext|>"):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert again.decode(again.encode(text)) == text


def test_the_hub_gets_the_folder(monkeypatch):
    calls = []
    api = types.SimpleNamespace(
        create_repo=lambda name, **how: calls.append((name, how)), upload_folder=lambda **how: calls.append(how)
    )
    fake = types.ModuleType("huggingface_hub")
    fake.HfApi = lambda: api
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    exporting.push(exporting.hub(), "me/model", Path("out"))
    assert calls == [("me/model", {"exist_ok": True}), {"repo_id": "me/model", "folder_path": "out"}]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub"):
        exporting.hub()


def test_the_card_says_what_the_model_is(tmp_path):
    recipe = dataclasses.replace(load("mor_tiny"), description="A small one.")
    rows = [{"step": 5, "loss": 2.5}, {"step": 10, "loss": 2.0, "eval/loss": 1.75}, {"step": 20, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"package": {"commit": "abc123", "changed": False}}
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    card = exporting.model_card(recipe, tmp_path, 10, "adaptive", "bfloat16")
    metrics = ("| loss | 2 |", "| eval/loss | 1.75 |", f"| data.source | {recipe.data.source} |")
    for text in ("# mor_tiny", "A small one.", "trust_remote_code=True", "abc123", '"recursions": 3', *metrics):
        assert text in card, text


# In the transformers library itself: the same logits, of its families and of others


def recipes():
    """Each kind of model that is written, once, at the size of a test."""
    found = {}
    for name in (name for name in list_recipes() if load(name).objective.causal):
        model = shapes.reduced(load(name).model, layers=2, vocab_size=64).at_step(-1)
        try:
            planned(model)
        except CheckpointError:
            continue
        found.setdefault(model, name)
    return {name: model for model, name in found.items()}


ABSENT = not all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
MODELS = {} if ABSENT else recipes()


@pytest.mark.compiles
@pytest.mark.skipif(ABSENT, reason="torch and transformers are not installed")
@pytest.mark.parametrize("name", MODELS or [""])
def test_logits_in_the_library_are_those_of_the_run(tmp_path, name):
    import torch
    import transformers

    settings, plan = MODELS[name], planned(MODELS[name])
    model = built(settings)
    export.export(tmp_path / "out", model, plan, ABOUT)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    rule = "threshold" if "threshold" in model.selections() else "topk"
    want = jax.jit(lambda m, t: m(t, selection=rule).logits)(model, jnp.asarray(tokens, jnp.int32))
    with torch.no_grad():
        got = there(torch.from_numpy(tokens)).logits.numpy()
        written = there.generate(torch.from_numpy(tokens[:1]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5 * max(1.0, float(np.abs(want).max())), rtol=0)
    close(got, want)
    if plan.kind == "adaptive":  # padding before a text changes nothing
        padded, mask = (np.pad(a, ((0, 0), (5, 0))) for a in (tokens[:1], np.ones((1, 24), np.int64)))
        with torch.no_grad():
            out = there(torch.from_numpy(padded), attention_mask=torch.from_numpy(mask))
        close(out.logits.numpy()[:, 5:], got[:1])
    assert written.shape == (1, 27)
    assert (plan.kind in families()) and (plan.kind != "adaptive") == ("modeling_adaptive" not in repr(type(there)))


@pytest.mark.skipif(ABSENT, reason="torch and transformers are not installed")
@pytest.mark.parametrize("name", ["bytes", "hnet-bytes", "bpe-4096"])
def test_the_library_encodes_alike(tmp_path, name):
    import transformers

    tokenizer, text = load_tokenizer(name), "The cat sat.\n  12 é漢"
    for file, content in tokenizer_files(tokenizer).items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    there = transformers.AutoTokenizer.from_pretrained(tmp_path)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert there(text)["input_ids"] == [*begin, *tokenizer.encode(text).tolist()]
    assert there.eos_token_id == tokenizer.eos_id and there.decode(there(text)["input_ids"][len(begin) :]) == text
