"""The command as a user meets it: released weights in, a run that other commands take, and the weights out again."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from oracle import hnet as oracle

from adaptive import train
from adaptive.convert import main
from adaptive.data.tokenizer_export import tokenizer_files
from adaptive.data.tokenizers import load_tokenizer
from adaptive.interop.files import read_tensors, write_safetensors
from adaptive.interop.official_hnet_config import config_from_official
from adaptive.runs.load import find, load
from adaptive.training.log import read_rows

pytestmark = pytest.mark.compiles

FIXTURES = Path(__file__).parent / "interop" / "fixtures"
CONFIG = oracle.official(["m1", ["T1"], "m1"], [16, 24], vocab=256, ff=[0, 64], heads=[2, 3])


@pytest.fixture
def convert(tmp_path, monkeypatch, capfd):
    """Runs the command in a folder with a released model's files; (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "small.safetensors", oracle.random_tensors(CONFIG, 0))

    def call(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out + err

    return call


IN = ("--kind", "hnet", "--tensors", "small.safetensors", "--config", "small.json", "--workdir", "run")
OUT = ("--kind", "hnet", "--workdir", "run", "--export", "out/back.safetensors")


def test_in_trained_further_and_out(convert, tmp_path, capfd):
    settings = ("data.seq_len=16", "train.batch_size=8", "train.steps=1", "optimizer.learning_rate=1e-9",
                "optimizer.weight_decay=0", "log.wandb=disabled", "eval.rows=4", "log.sample_tokens=0")  # fmt: skip
    code, said = convert(*IN, *settings)
    assert code == 0, said
    tensors, text = oracle.random_tensors(CONFIG, 0), b"The cat sat on the mat."
    trained = load(find("run"))
    assert trained.step == 0 and trained.recipe.name == "small" and not trained.refuse_generation
    assert trained.tokenizer.vocab_size == 256 and trained.recipe.model.body.capacities == ()
    model = nnx.merge(trained.graphdef, trained.state)
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    want = oracle.forward(tensors, CONFIG, tokens)
    np.testing.assert_allclose(jax.jit(model)(tokens[None]).logits[0], want.logits, atol=1e-4, rtol=0)

    code, said = convert(*OUT)
    assert code == 0, said
    back = read_tensors("out/back.safetensors")
    written = json.loads((tmp_path / "out/back.json").read_text())
    assert set(back) == set(tensors) and config_from_official(written) == trained.recipe.model
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)

    assert train.main(["--recipe", "run/recipe.json", "--workdir", "run"]) == 0
    assert "from step 0" in capfd.readouterr().out
    assert find("run").step == 1
    # A step of next to nothing from the released weights: had training started anew, nothing would be the same.
    after = nnx.merge(trained.graphdef, load(find("run")).state)
    np.testing.assert_allclose(after.embedding[...], tensors["embeddings.weight"], atol=1e-6)
    assert read_rows("run")[0]["step"] == 1


def test_a_folder_of_the_hub_in_and_out_again(convert, tmp_path):
    """Tensors come back to the byte, and so does the tokenizer."""
    shutil.copytree(FIXTURES / "tiny_llama_bytes", tmp_path / "hub")
    code, said = convert("--from", "hub", "--workdir", "run")
    assert code == 2 and "does not say how text becomes tokens: add data.tokenizer" in said, said
    for name, text in tokenizer_files(load_tokenizer("bytes")).items():
        (tmp_path / "hub" / name).write_text(text, encoding="utf-8")
    code, said = convert("--from", "hub", "--workdir", "run", "data.tokenizer=bpe-4096")
    assert code == 2 and "has ids up to 4,095 and the model embeddings of 320 tokens" in said, said
    assert not (tmp_path / "run").exists()
    code, said = convert("--from", "hub", "--workdir", "run", "mesh.fsdp=2")
    assert code == 0, said
    trained = load(find("run"))
    assert trained.recipe.data.tokenizer == str(tmp_path / "run" / "tokenizer") and trained.tokenizer.eos_id == 256
    assert trained.recipe.data.seq_len == 512
    code, said = convert("--workdir", "run", "--export", "out", "--dtype", "bfloat16")
    assert code == 0 and "read back logits are within 0 of the run's" in said, said
    before, after = read_tensors("hub"), read_tensors("out")
    assert set(before) == set(after)
    assert all(value.tobytes() == after[name].tobytes() for name, value in before.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == 256
    assert config["max_position_embeddings"] == 512
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]["a"] == ord("a")
    code, said = convert("--workdir", "run", "--export", "out")
    assert code == 2 and "out holds files already" in said, said


def test_numbers_that_are_not_finite_are_not_written(convert, tmp_path, monkeypatch):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config_from_official(CONFIG).build(jax.random.key(0))))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), state)
    state["embedding"][...][0, :2] = np.nan
    monkeypatch.setattr("adaptive.runs.load.find", lambda workdir: workdir)
    monkeypatch.setattr("adaptive.runs.load.load", lambda found: SimpleNamespace(graphdef=graphdef, state=state))
    code, said = convert(*OUT)
    assert code == 2
    assert "2 of the 4,096 numbers in embeddings.weight are not finite in float32" in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["--kind, --tensors, --config, --workdir is missing"]),
        (["--kind", "hnet", "--export", "x.safetensors"], ["--workdir is missing"]),
        (["--kinds", "hnet"], ["kinds"]),
        ([*IN, "steps"], ["'steps' is neither"]),
        ([*IN, "train.stpes=1"], ["train.stpes", "train.steps"]),
        ([*IN, "--kind", "hent"], ["unknown kind 'hent'", "did you mean hnet"]),
        ([*IN, "--tensors", "gone.safetensors"], ["no file gone.safetensors", "small.safetensors"]),
        ([*IN, "--config", "gone.json"], ["cannot read --config gone.json", "No such file"]),
        ([*IN, "--config", "small.safetensors"], ["is not JSON"]),
        ([*IN, "--config", "other.json"], ["d_modell is unknown", "d_model"]),
        ([*IN, "--config", "wider.json"], ["embeddings.weight has shape [256, 16], expected [256, 32]"]),
        ([*IN, "--workdir", "taken"], ["taken holds a run already"]),
        ([*IN, "--workdir", "full"], ["full is not the folder of a run"]),
        ([*IN, "model.body.inner_width=48"], ["another model than the tensors"]),
        ([*IN, "--kind", "mixtral"], ["--kind mixtral does not say how text becomes tokens", "data.tokenizer="]),
        ([*OUT, "train.steps=3"], ["takes no settings"]),
        ([*OUT, "--export", "folder"], ["--kind hnet: a folder is written of"]),
        ([*IN, "--from", "x"], ["leave out --tensors, --config and --export"]),
        (["--from", "gone", "--workdir", "run"], ["--from gone: expected a folder with a config.json"]),
        ([*OUT, "--push", "me/model"], ["--push uploads a folder"]),
        ([*OUT, "--workdir", "gone"], ["gone", "no such folder"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused(convert, tmp_path, arguments, says):
    (tmp_path / "other.json").write_text(json.dumps({"d_modell": [16]}))
    (tmp_path / "wider.json").write_text(json.dumps(CONFIG | {"d_model": [32, 48]}))
    for folder, file in (("taken", "recipe.json"), ("full", "thesis.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    code, output = convert(*arguments)
    assert code == 2
    assert all(text in output for text in says), output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
