"""Mixtral, OLMoE and Qwen3-MoE in our model, against what the transformers library computed; and the way back.

The recordings are made by scripts/record_transformers_fixtures.py, which says what they hold.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.errors import UserError
from adaptive.interop import from_official, to_official
from adaptive.interop.hf_moe_config import KINDS, config_from_transformers
from adaptive.layers.feed_forwards import dense, experts
from adaptive.layers.mixers import mamba2
from adaptive.layers.moe.routers import top_p
from adaptive.models.bodies import recursive
from adaptive.models.language_model import LanguageModel
from adaptive.settings import leaf_values, with_leaf

pytestmark = pytest.mark.compiles

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
FUSED = ("mixtral", "mixtral-window", "olmoe", "qwen3_moe", "qwen3_moe-dense")  # with gradients
GRADIENTS = ("mixtral", "olmoe", "qwen3_moe-dense")


def kind_of(name):
    return name.split("-")[0]


@functools.cache
def recorded(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def config_of(name):
    return json.loads(str(recorded(name)["config"]))


def under(name, folder):
    """What the recording holds as `folder`/TENSOR, by TENSOR; weights in float32."""
    prefix = f"{folder}/"
    held = {key.removeprefix(prefix): value for key, value in recorded(name).items() if key.startswith(prefix)}
    return {key: value.astype(np.float32) for key, value in held.items()}


def loss_and_output(tensors, name):
    """What the library's model returns as its loss: next token's cross entropy, padding left out, and the aux loss."""
    held = recorded(name)
    mask, tokens = held["mask"], jnp.asarray(held["tokens"], jnp.int32)
    model = from_official(kind_of(name), tensors, config_of(name))
    out = model(tokens, segment_ids=None if mask.all() else jnp.asarray(mask, jnp.int32))
    logp = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(logp * mask[:, 1:]).sum() / mask[:, 1:].sum() + out.aux.total(), out


def compiled(function):
    """Optimised little, because compiling is most of the time here."""
    return jax.jit(function)


def test_there_are_recordings_of_every_kind():
    assert {kind_of(name) for name in CASES} == set(KINDS) and set(FUSED) < set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(name):
    held = recorded(name)
    loss, out = compiled(lambda tensors: loss_and_output(tensors, name))(under(name, "published"))
    there = held["mask"] > 0
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out.logits)[there], held["logits"][there], atol=2e-5, rtol=0)
    np.testing.assert_allclose(out.aux["load_balancing_loss"].value, held["aux_loss"], rtol=1e-6)
    assert out.aux["load_balancing_loss"].coefficient == config_of(name)["router_aux_loss_coef"]
    np.testing.assert_allclose(loss, held["loss"], rtol=2e-6)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_come_back_under_the_names_that_went_in(name):
    got = compiled(jax.grad(lambda tensors: loss_and_output(tensors, name)[0]))(under(name, "fused"))
    want = under(name, "gradients")
    assert set(got) == set(want)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, atol=1e-4 * np.abs(value).max(), rtol=0, err_msg=key)


@pytest.mark.parametrize(
    ("name", "module", "matrices"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_gradients_of_single_experts_are_slices_of_the_library_s(name, module, matrices):
    published, want = under(name, "published"), under(name, "gradients")
    got = compiled(jax.grad(lambda tensors: loss_and_output(tensors, name)[0]))(published)
    assert set(got) == set(published)
    for layer in ("model.layers.0", "model.layers.1"):
        both, down = want[f"{layer}.mlp.experts.gate_up_proj"], want[f"{layer}.mlp.experts.down_proj"]
        for e in range(len(both)):
            for piece, matrix in zip((*np.split(both[e], 2), down[e]), matrices, strict=True):
                mine = got[f"{layer}.{module}.experts.{e}.{matrix}.weight"]
                np.testing.assert_allclose(mine, piece, atol=1e-4 * np.abs(piece).max() + 1e-8, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    published, kind = under(name, "published"), kind_of(name)
    forms = [published] + [under(name, "fused")] * (name in FUSED)
    for tensors in forms:
        back = to_official(kind, from_official(kind, tensors, config_of(name)))
        assert set(back) == set(published)
        for key, value in published.items():
            np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_loaded_model_is_an_ordinary_one():
    """The tree, shapes and axes of a model drawn from a key; half precision goes in."""
    for name in CASES:
        tensors = {key: value.astype(np.float16) for key, value in under(name, "published").items()}
        loaded = from_official(kind_of(name), tensors, config_of(name))
        ours = config_from_transformers(kind_of(name), config_of(name))
        fresh = nnx.eval_shape(lambda ours=ours: ours.build(jax.random.key(0)))
        assert isinstance(loaded, LanguageModel) and nnx.graphdef(loaded) == nnx.graphdef(fresh)
        pairs = zip(nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(fresh)), strict=True)
        for (path, mine), (other, theirs) in pairs:
            assert path == other and mine.get_metadata() == theirs.get_metadata()
            assert mine[...].dtype == jnp.float32 and mine[...].shape == theirs.shape
        count = sum(value.size for value in jax.tree.leaves(nnx.state(loaded)))
        assert count == sum(value.size for value in tensors.values())


@pytest.mark.parametrize("name", ["mixtral-window", "qwen3_moe-dense"])
def test_generation_equals_the_full_forward_pass(name):
    model = from_official(kind_of(name), under(name, "published"), config_of(name))
    tokens = jnp.asarray(recorded(name)["tokens"], jnp.int32)
    graphdef, state = nnx.split(model)
    extend = compiled(lambda state, tokens, cache: nnx.merge(graphdef, state).prefill(tokens, cache))
    cache, pieces = model.init_cache(*tokens.shape), []
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, tokens.shape[1]))]:
        out, cache = extend(state, tokens[:, start:stop], cache)
        pieces.append(out.logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), recorded(name)["logits"], atol=3e-5, rtol=0)


# Configurations


@pytest.mark.parametrize("name", CASES)
def test_older_versions_of_a_configuration_are_the_same(name):
    config = config_of(name)
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    old |= {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16"}
    for newer, older in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        if newer in config:
            old[older] = old.pop(newer)
            break
    old |= {"max_window_layers": 28, "use_cache": False, "partial_rotary_factor": None, "something_new": 3}
    assert config_from_transformers(kind_of(name), old) == config_from_transformers(kind_of(name), config)


def read(name, **changes):
    return config_from_transformers(kind_of(name), config_of(name) | changes)


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("qwen3_moe", {"sliding_window": 2}, {"mixer.window": 0}),
        ("qwen3_moe", {"sliding_window": 2, "use_sliding_window": True}, {"mixer.window": 2}),
        ("qwen3_moe", {"sliding_window": None, "use_sliding_window": True}, {"mixer.window": 0}),
        ("olmoe", {"sliding_window": 2}, {"mixer.window": 0}),
        ("mixtral", {"num_key_value_heads": None}, {"mixer.kv_heads": 4}),
        ("mixtral", {"head_dim": None}, {"mixer.head_dim": 4}),
        ("mixtral", {"attention_bias": True}, {"mixer.bias": "none"}),  # no such field: the library ignores it too
        ("mixtral", {"norm_topk_prob": False, "hidden_act": "swish"}, {}),
        ("mixtral", {"rope_scaling": {"type": "default"}, "rope_theta": 77}, {"mixer.rope_theta": 77.0}),
        ("mixtral", {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, {"mixer.rope_theta": 5.0}),
        ("mixtral", {"rope_parameters": None}, {"mixer.rope_theta": 1e6}),
        ("olmoe", {"rope_parameters": {}}, {"mixer.rope_theta": 1e4}),
        ("olmoe", {"clip_qkv": 8}, {"mixer.clip_qkv": 8.0}),
        ("olmoe", {"pad_token_id": -1}, {"padding_token": 39}),
    ],
)
def test_fields_mean_what_they_mean_to_the_library(name, changes, fields):
    """`fields`: settings of ours by their path in the model, or in its blocks."""
    inside = "body.stack.blocks.0."
    unchanged, got = (
        {path.removeprefix(inside): value for path, value in leaf_values(settings).items()}
        for settings in (read(name), read(name, **changes))
    )
    assert {path for path in unchanged if unchanged[path] != got[path]} <= set(fields)
    assert {path: got[path] for path in fields} == fields


def blocks(settings):
    return settings.body.stack.blocks


def test_what_is_left_out_has_the_default_of_the_library():
    mixtral, olmoe, qwen = (config_from_transformers(kind, {}) for kind in KINDS)
    layers = [settings.body.layers for settings in (mixtral, olmoe, qwen)]
    assert layers == [32, 16, 24] and all(len(blocks(s)) == 1 for s in (mixtral, olmoe, qwen))
    mixer, routed = blocks(mixtral)[0].mixer, blocks(mixtral)[0].feed_forward
    assert (mixtral.width, routed.expert_size, mixer.kv_heads, mixer.rope_theta) == (4096, 14336, 8, 1e6)
    assert routed.router.normalise
    mixer, routed = blocks(olmoe)[0].mixer, blocks(olmoe)[0].feed_forward
    assert (mixer.kv_heads, routed.experts, routed.router.experts_per_token, olmoe.padding_token) == (16, 64, 8, 1)
    assert not routed.router.normalise
    mixer, routed = blocks(qwen)[0].mixer, blocks(qwen)[0].feed_forward
    assert (mixer.head_dim, routed.expert_size, qwen.norm_eps, mixer.window) == (64, 768, 1e-6, 0)


def dense_layers(settings):
    stack = settings.body.stack
    assert all(isinstance(b.feed_forward, dense.Settings | experts.Settings) for b in stack.blocks)
    of = [i for i, block in enumerate(stack.blocks) if isinstance(block.feed_forward, dense.Settings)]
    return sorted(number for i in of for number in stack.numbers(i))


def test_dense_layers_are_those_of_the_library():
    assert dense_layers(read("qwen3_moe-dense")) == [0, 2, 3, 4]
    assert dense_layers(read("qwen3_moe", mlp_only_layers=[0, 1])) == [0, 1]
    assert dense_layers(read("qwen3_moe", num_local_experts=0)) == [0, 1]


def test_layers_are_the_shortest_pattern():
    settings = read("qwen3_moe", num_hidden_layers=12, decoder_sparse_step=3)
    assert dense_layers(settings) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert [block.repeat for block in blocks(settings)] == [2, 1] and settings.body.stack.repeats == 4
    settings = read("qwen3_moe", num_hidden_layers=12, decoder_sparse_step=3, mlp_only_layers=[2])
    assert dense_layers(settings) == [0, 1, 2, 3, 4, 6, 7, 9, 10]
    assert [block.repeat for block in blocks(settings)] == [5, 1, 2, 1, 2, 1] and settings.body.stack.repeats == 1


def test_the_balancing_loss_is_reported_where_it_is_not_trained():
    config = config_of("olmoe") | {"output_router_logits": False}
    model = from_official("olmoe", under("olmoe", "published"), config)
    out = model(jnp.asarray(recorded("olmoe")["tokens"], jnp.int32))
    np.testing.assert_allclose(out.aux["load_balancing_loss"].value, recorded("olmoe")["aux_loss"], rtol=1e-6)
    assert out.aux.total() == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu': is not supported, only 'silu'"),
        (
            "mixtral",
            {"model_type": "olmoe"},
            "model_type='olmoe': this kind reads 'mixtral' alone; that is kind 'olmoe'",
        ),
        ("mixtral", {"model_type": "llama"}, "model_type='llama': this kind reads 'mixtral' alone"),
        ("mixtral", {"hidden_size": "16"}, "hidden_size='16': must be an integer"),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps=None: must be a number"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0: must be at least 1, or null"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type='linear' is not supp"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn' is not supported"),
        ("olmoe", {"rope_parameters": {"full": {"rope_type": "default"}}}, "per layer type are not supported"),
        ("olmoe", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 must be a number above 0"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv=0.0: must be above 0"),
        ("olmoe", {"head_dim": 8}, "times head_dim=8 must be hidden_size=16"),
        ("olmoe", {"num_local_experts": 7}, "num_local_experts=7 and num_experts=8 are two names of one setting"),
        ("olmoe", {"num_experts_per_tok": 9}, "experts_per_token=9"),
        ("olmoe", {"pad_token_id": 40}, "pad_token_id=40: must be a token below vocab_size=40"),
        ("olmoe", {"attention_dropout": 0.1}, "attention_dropout=0.1: has no counterpart"),
        ("olmoe", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: has no counterpart"),
        ("mixtral", {"num_key_value_heads": 3}, r"heads=4 is not a multiple of .*kv_heads can be 1, 2, 4"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be at least 1"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers='0': must be a list"),
    ],
)
def test_configurations_that_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        from_official(kind_of(name), under(name, "published"), config_of(name) | changes)


# Tensors


def fused(tensors, name="mixtral"):
    tensors.clear()
    tensors |= under(name, "fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"official mixtral: model\.norm\.weight \[16\] is missing"),
        (
            lambda t: t.update({"model.layers.0.block_sparse_moe.gates.weight": t.pop(
                "model.layers.0.block_sparse_moe.gate.weight")}),
            r"gate\.weight \[4, 16\] is missing.*unknown model\.layers\.0\.block_sparse_moe\.gates\.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.4.w1.weight": np.zeros((12, 16))}),
            r"experts\.4\.w1\.weight is unknown.*a name of this model is model\.layers\.1\.block_sparse_moe\.experts",
        ),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w2.weight": np.zeros((12, 16))}),
            r"experts\.2\.w2\.weight has shape \[12, 16\], expected \[16, 12\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(16)}),
            r"self_attn\.q_norm\.weight is unknown to a model of this configuration",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj": np.zeros((4, 16, 12))}),
            r"mlp\.experts\.down_proj and .*experts\.0\.w2\.weight are the same weights; give one form",
        ),
        (
            lambda t: (fused(t), t.update({"model.layers.0.mlp.experts.gate_up_proj": np.zeros((4, 16, 24))})),
            r"mlp\.experts\.gate_up_proj has shape \[4, 16, 24\], expected \[4, 24, 16\]",
        ),
        (
            lambda t: (fused(t), t.pop("model.layers.1.mlp.experts.down_proj")),
            r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight \[16, 12\].* are missing",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, message):
    tensors = under("mixtral", "published")
    change(tensors)
    with pytest.raises(UserError, match=message):
        from_official("mixtral", tensors, config_of("mixtral"))


def test_rotary_frequencies_may_be_there():
    tensors = under("mixtral", "published")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}
    assert set(to_official("mixtral", from_official("mixtral", tensors | more, config_of("mixtral")))) == set(tensors)


def test_the_head_of_a_tied_model():
    """Repeated, alone, or of its own: then the model is not tied, as the library has it."""
    name, head, embedding = "mixtral-window", "lm_head.weight", "model.embed_tokens.weight"
    tensors, config = under(name, "published"), config_of(name)
    repeated = tensors | {head: tensors[embedding].copy()}
    alone = {key: value for key, value in repeated.items() if key != embedding}
    for given in (repeated, alone):
        back = to_official("mixtral", from_official("mixtral", given, config))
        assert set(back) == set(tensors)
        np.testing.assert_array_equal(back[embedding], tensors[embedding])
    model = from_official("mixtral", repeated | {head: 2 * tensors[embedding]}, config)
    assert not model.settings.tie_embeddings
    out = model(jnp.asarray(recorded(name)["tokens"], jnp.int32))
    np.testing.assert_allclose(out.logits, 2 * recorded(name)["logits"], atol=4e-5, rtol=0)
    gradients = compiled(jax.grad(lambda tensors: loss_and_output(tensors, name)[0]))(repeated)
    want = under(name, "gradients")[embedding]
    np.testing.assert_allclose(gradients[embedding], want, atol=1e-4 * np.abs(want).max(), rtol=0)
    assert not np.asarray(gradients[head]).any()


def test_only_a_model_of_the_kind_goes_out():
    models = {kind: from_official(kind, under(kind, "published"), config_of(kind)) for kind in KINDS}
    with pytest.raises(UserError, match=r"official olmoe: a model of this kind has qk_norm=full"):
        to_official("olmoe", models["mixtral"])
    with pytest.raises(UserError, match=r"has qk_norm=none"):
        to_official("mixtral", models["qwen3_moe"])
    with pytest.raises(UserError, match="has no official names"):
        to_official("mixtral", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("body.stack.blocks.0.feed_forward", dense.Settings(8), r"has experts in every layer"),
        ("body.stack.blocks.0.feed_forward", None, "has one kind of experts"),
        ("body.stack.blocks.0.feed_forward.router", top_p.Settings(), "has router=token_choice"),
        ("body.stack.blocks.0.feed_forward.router.normalise", False, r"has router\.normalise=true"),
        ("body.stack.blocks.0.feed_forward.router.capacity_factor", 1.0, r"has router\.capacity_factor=0"),
        ("body.stack.blocks.0.feed_forward.activation", "gelu", "has activation=silu"),
        ("body.stack.blocks.0.mixer.bias", "all", "has no biases"),
        ("body.stack.blocks.0.mixer.rotary_dim", 2, "rotates all channels"),
        ("body.stack.blocks.0.mixer", mamba2.Settings(head_dim=8), "has the same attention in every layer"),
        ("body", recursive.Settings(), r"is one stack \(body=plain\), not recursive"),
    ],
)
def test_models_without_official_names(path, value, message):
    settings = with_leaf(config_from_transformers("mixtral", config_of("mixtral")), path, value)
    with pytest.raises(UserError, match=message):
        to_official("mixtral", nnx.eval_shape(lambda: settings.build(jax.random.key(0))))
