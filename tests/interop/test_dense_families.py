"""Dense models of every family in ours, against what the transformers library computed; and the way back.

The recordings are made by scripts/record_dense_fixtures.py; the folders besides are checkpoints as they are published.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_account import program, traced_flops

from adaptive.account import account, parameters
from adaptive.errors import CheckpointError, UserError
from adaptive.interop import from_official, huggingface, to_official
from adaptive.interop.families import families, kind_of
from adaptive.interop.files import lazy_tensors, read_tensors
from adaptive.settings import leaf_values, with_leaf

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.stem for path in (FIXTURES / "dense").glob("*.npz"))
FOLDERS = ("rand_gpt2", "rand_llama_untied_sharded", "tiny_llama_bytes")
GENERATED = ("gemma3-windows", "gpt2-untied")


def kind(name):
    return name.split("-")[0]


@functools.cache
def recorded(name):
    with np.load(FIXTURES / "dense" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def config_of(name):
    return json.loads(str(recorded(name)["config"]))


def published(name):
    held = {key.removeprefix("published/"): value for key, value in recorded(name).items() if key.startswith("publ")}
    return {key: value.astype(np.float32) for key, value in held.items()}


def folder_config(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def test_there_are_recordings_of_every_dense_family():
    assert {kind(name) for name in CASES} == {
        "gemma2",
        "gemma3",
        "gpt2",
        "llama",
        "mistral",
        "olmo2",
        "qwen2",
        "qwen3",
        "smollm3",
    }
    assert {*map(kind, CASES), "mixtral", "olmoe", "qwen3_moe", "adaptive"} == set(families())


@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
def test_equals_the_library_and_goes_back(name):
    model = from_official(kind(name), published(name), config_of(name))
    out = jax.jit(model)(jnp.asarray(recorded(name)["tokens"], jnp.int32))
    np.testing.assert_allclose(out.logits, recorded(name)["logits"], atol=2e-5, rtol=0)
    assert parameters(model.settings).total == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    back = to_official(kind(name), model)
    assert set(back) == set(published(name))
    for key, value in published(name).items():
        np.testing.assert_allclose(back[key], value, atol=1e-7, rtol=0, err_msg=key)


@pytest.mark.compiles
@pytest.mark.parametrize("name", FOLDERS)
def test_published_folders(name):
    tensors, config = read_tensors(FIXTURES / name), folder_config(name)
    model = from_official(kind_of(config), tensors, config)
    with np.load(FIXTURES / name / "reference.npz") as held:
        prompts = [held[f"ids{i}"].reshape(-1) for i in (0, 1)]
        longest = max(map(len, prompts))
        rows = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in prompts])
        logits = np.asarray(jax.jit(model)(jnp.asarray(rows, jnp.int32)).logits)
        for i, ids in enumerate(prompts):  # what follows a prompt changes nothing in it
            want = held[f"logits{i}"].reshape(len(ids), -1)
            np.testing.assert_allclose(logits[i, : len(ids)], want, atol=2e-5, rtol=0)
    back = to_official(kind_of(config), model)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert np.asarray(back[key]).astype(value.dtype).tobytes() == value.tobytes(), key


@pytest.mark.compiles
@pytest.mark.parametrize("name", GENERATED)
def test_generation_equals_the_full_forward_pass(name):
    model = from_official(kind(name), published(name), config_of(name))
    tokens = jnp.asarray(recorded(name)["tokens"], jnp.int32)
    graphdef, state = nnx.split(model)
    extend = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).prefill(tokens, cache))
    cache, pieces = model.init_cache(*tokens.shape), []
    for start in range(0, tokens.shape[1], 8):
        out, cache = extend(state, tokens[:, start : start + 8], cache)
        pieces.append(out.logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), recorded(name)["logits"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_comes_back_the_same(name):
    family = families()[kind(name)]
    ours = huggingface.settings_of(family, config_of(name))
    written = huggingface.config_of(kind(name), ours)
    assert kind_of(written) == kind(name)
    json.dumps(written)
    again = huggingface.config_of(kind(name), huggingface.settings_of(family, written))
    assert again == written


@pytest.mark.compiles
@pytest.mark.parametrize("name", [*FOLDERS, "gemma3-windows"])
def test_parameters_are_made_one_by_one_of_tensors_in_files(name):
    """The same as all at once, and only as many numbers at a time as the largest parameter has."""
    config = folder_config(name) if name in FOLDERS else config_of(name)
    tensors = lazy_tensors(FIXTURES / name) if name in FOLDERS else published(name)
    found = huggingface.read(kind_of(config), tensors, config)
    _, shapes = nnx.split(nnx.eval_shape(lambda: found.settings.build(jax.random.key(0))))
    state = found.state(shapes, lambda path, value: value)
    whole = nnx.state(from_official(kind_of(config), tensors, config))
    for path, leaf in nnx.to_flat_state(whole):
        np.testing.assert_array_equal(dict(nnx.to_flat_state(state))[path][...], leaf[...], err_msg=str(path))


@pytest.mark.compiles
@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("name", ["gpt2-untied", "gemma3-windows", "qwen2-tied"])
def test_a_training_step_has_the_matmuls_of_the_account(name, remat):
    model = huggingface.settings_of(families()[kind(name)], config_of(name))
    assert traced_flops(*program(model, remat, seq=24)) == account(model, 24).train_flops(remat)


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-bias", {"hidden_act": "gelu"}, "llama: hidden_act='gelu': is not supported, only 'silu'"),
        ("llama-bias", {"mlp_bias": True}, "mlp_bias=True: is not supported"),
        ("llama-bias", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported, only"),
        ("llama-bias", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor=None: must be a number"),
        ("llama-bias", {"rope_scaling": {"rope_type": "linear", "factor": 2, "odd": 1}}, r"rope_scaling.odd=1 is not"),
        ("llama-bias", {"residual_multiplier": 0.22}, "residual_multiplier=0.22: nothing here knows"),
        ("llama-bias", {"quantization_config": {"bits": 4}}, "quantization_config=.*give the tensors in a float"),
        ("llama-bias", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: .* at most 1000"),
        ("llama-bias", {"num_key_value_heads": 3}, r"heads=4 is not a multiple of .*kv_heads can be 1, 2, 4"),
        ("llama-bias", {"pad_token_id": 40}, "pad_token_id=40: must be a token below vocab_size=40"),
        ("mistral-window", {"layer_types": ["full_attention", "sliding_attention"]}, "one kind of attention"),
        ("qwen2-window", {"layer_types": ["full_attention"]}, "layer_types=.*: must be a list of 3"),
        ("smollm3-nope", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*must be a list of 5"),
        ("gemma3-windows", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: is not supported"),
        ("gpt2-untied", {"activation_function": "relu"}, "activation_function='relu': is not supported"),
        ("gpt2-untied", {"n_head": 3}, "n_head=3: must divide n_embd=16"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        huggingface.settings_of(families()[kind(name)], config_of(name) | changes)


def test_an_unknown_architecture_names_those_that_are_known():
    with pytest.raises(UserError, match=r"architecture FalconForCausalLM is not known here, known: .*LlamaForCausalLM"):
        kind_of({"architectures": ["FalconForCausalLM"]})
    with pytest.raises(UserError, match=r"nearest: Qwen[23]ForCausalLM"):
        kind_of({"architectures": ["Qwen4ForCausalLM"]})
    with pytest.raises(UserError, match="model_type='bert' is none of"):
        kind_of({"model_type": "bert"})
    assert kind_of({"model_type": "gemma3_text"}) == "gemma3"


def test_everything_that_is_wrong_with_tensors_is_listed():
    tensors = published("qwen2-tied")
    layer = "model.layers.0"
    del tensors["model.norm.weight"], tensors[f"{layer}.self_attn.q_proj.bias"]
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors[f"{layer}.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors[f"{layer}.mlp.down_proj.weight"] = np.zeros((16, 12), np.int8)
    tensors[f"{layer}.mlp.gate_proj.weight"] = np.full((12, 16), np.nan, np.float32)
    with pytest.raises(UserError) as refused:
        from_official("qwen2", tensors, config_of("qwen2-tied"))
    for text in ("q_proj.bias [16]", "model.norm.weight [16]", "are missing", "model.extra.weight is unknown",
                 "up_proj.weight has shape [3, 3], expected [12, 16]", "down_proj.weight is int8",
                 "192 of the 192 numbers in model.layers.0.mlp.gate_proj.weight are not finite"):  # fmt: skip
        assert text in str(refused.value), text


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("qwen2-tied", "body.stack.blocks.0.mixer.bias", "all", "layer 0 mixer.bias=qkv, this one has all"),
        ("llama-bias", "body.stack.blocks.0.mixer.window", 4, "layer 0 mixer.window=0, this one has 4"),
        ("llama-bias", "body.stack.blocks.0.norms_at", "output", "layer 0 norms_at=input, this one has output"),
        ("olmo2-norms", "embedding_scale", 2.0, "embedding_scale=1.0, this one has 2.0"),
        ("gpt2-untied", "positions", 0, "n_positions=0"),
    ],
)
def test_models_without_a_name_in_the_family_are_refused(name, path, value, message):
    ours = with_leaf(huggingface.settings_of(families()[kind(name)], config_of(name)), path, value)
    with pytest.raises(CheckpointError, match=message):
        huggingface.config_of(kind(name), ours)


def test_saved_recipes_of_earlier_versions_have_biases_of_all_or_none():
    from adaptive.layers.mixers import attention
    from adaptive.settings import read, to_tree

    tree = to_tree(attention.Settings(bias="all"))
    new = ("rope_scaling", "scale", "soft_cap")
    old = {name: value for name, value in tree.items() if name not in new}
    for truth, bias in ((True, "all"), (False, "none")):
        found = read(attention.Settings, old | {"bias": truth}, where="mixer")
        assert leaf_values(found) == leaf_values(attention.Settings(bias=bias))
