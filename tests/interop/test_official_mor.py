"""Released Mixture-of-Recursions weights in our model, against the oracle; and the way back."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import mor as oracle

from adaptive.errors import UserError
from adaptive.interop import from_official, to_official
from adaptive.interop.official_mor_config import config_from_official
from adaptive.models.language_model import LanguageModel

pytestmark = pytest.mark.compiles

CONFIGS = oracle.configs()
# The first recursion's keys and values are those of all tokens: our model asks for a first capacity of 1 then.
REFUSED = {"expert-kv-small-first"}
WARMUPS = {"expert-warmup", "token-warmup"}
# Gradients of one of every kind of routing and loss, with keys of their own and shared; of the rest, values alone.
GRADIENTS = {
    "recursive-kv-middle_cycle", "expert", "expert-cycle-kv", "expert-aux-router-mlp", "token-kv", "token-free-sigmoid",
}  # fmt: skip
# Where seed 0 leaves a routing decision to rounding.
SEEDS = {"token-wide-sigmoid": 3}
BATCH, SEQ = 2, 22


@functools.cache
def row(seed: int = 7):
    return np.random.default_rng(seed).integers(0, 64, (BATCH, SEQ), dtype=np.int32)


def cross_entropy(logits):
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, row()[:, 1:, None], axis=-1).mean()


def ours(tensors, config, **call):
    """(total loss, output), the auxiliary router's loss added too: it reaches no tensor that the rest reaches."""
    out = from_official("mor", tensors, config)(row(), **call)
    return cross_entropy(out.logits) + out.aux.total() + out.aux.separate_total(), out


def theirs(tensors, config, call=None):
    out = oracle.forward(tensors, config, row(), call)
    return oracle.total_loss(out, row()) + sum(value for value, _ in out["apart"].values()), out


def measured(name, loss_and_output):
    """(tensors, ...) -> ((loss, output), gradients of the loss, or {} where only values are compared)."""
    if name in GRADIENTS:
        return jax.value_and_grad(loss_and_output, has_aux=True)
    return lambda *args, **kwargs: (loss_and_output(*args, **kwargs), {})


@functools.cache
def compiled(name):
    """Loss, output and gradients of our model; optimised little, because compiling is most of the time here."""
    config = CONFIGS[name]

    def run(tensors, step):
        return measured(name, ours)(tensors, config, deterministic=step is None, step=step)

    return jax.jit(run)


def compare(name, call=None):
    """`call` counts training passes from 1, as the oracle does; our model's steps count from 0."""
    config = CONFIGS[name]
    tensors = oracle.random_tensors(config, SEEDS.get(name, 0))
    (got_loss, got), got_grads = compiled(name)(tensors, None if call is None else jnp.asarray(call - 1))
    (want_loss, want), want_grads = measured(name, theirs)(tensors, config, call)
    assert want["margin"] > 1e-5, "choose another seed: routing is decided by rounding"
    assert got.logits.dtype == jnp.float32 and got.trace.depth.dtype == jnp.int32
    np.testing.assert_array_equal(got.trace.depth, want["depth"])
    if config["mor"]["enable"] and config["mor"]["type"] == "expert":
        assert len(got.trace.selections) == config["recursive"]["num_recursion"]
        for mine, selected, gates in zip(got.trace.selections, want["selected"], want["gates"], strict=True):
            for b in range(BATCH):
                places = np.flatnonzero(selected[b])
                valid = np.asarray(mine.valid[b])
                np.testing.assert_array_equal(np.asarray(mine.indices[b])[valid], places)
                np.testing.assert_allclose(mine.weights[b][valid], gates[b][places], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got.logits, want["logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(got.hidden, want["hidden"], atol=2e-5, rtol=0)
    expected = want["losses"] | want["apart"]
    assert set(got.aux) == set(expected)
    for loss, (value, coefficient) in expected.items():
        np.testing.assert_allclose(got.aux[loss].value, value, atol=5e-6)
        if loss in want["losses"]:
            assert got.aux[loss].coefficient == coefficient
    np.testing.assert_allclose(got_loss, want_loss, atol=5e-6)
    assert set(got_grads) == set(want_grads)
    for key, grad in want_grads.items():
        np.testing.assert_allclose(got_grads[key], grad, atol=1e-4 * np.abs(grad).max(), err_msg=key)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in REFUSED | WARMUPS])
def test_equals_the_oracle(name):
    compare(name)


@pytest.mark.parametrize("name", sorted(WARMUPS))
def test_warmups_equal_the_oracle(name):
    for call in (3, 5):
        compare(name, call)


def test_a_small_first_capacity_with_shared_keys_is_refused():
    config = CONFIGS["expert-kv-small-first"]
    with pytest.raises(UserError, match="first share must be 1"):
        from_official("mor", oracle.random_tensors(config, 0), config)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in REFUSED])
def test_round_trip(name):
    config = CONFIGS[name]
    tensors = oracle.random_tensors(config, 1)
    back = to_official("mor", from_official("mor", tensors, config))
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_loaded_model_is_an_ordinary_one():
    """The same tree of parameters, shapes and axes as a model drawn from a key; numpy and half precision go in."""
    config = CONFIGS["expert-aux-router-mlp"]
    tensors = {k: np.asarray(v).astype(np.float16) for k, v in oracle.random_tensors(config, 0).items()}
    loaded = from_official("mor", tensors, config)
    fresh = config_from_official(config).build(jax.random.key(0))
    assert isinstance(loaded, LanguageModel) and nnx.graphdef(loaded) == nnx.graphdef(fresh)
    pairs = zip(nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(fresh)), strict=True)
    for (path, mine), (same, other) in pairs:
        assert path == same and mine.get_metadata() == other.get_metadata()
        assert mine[...].dtype == jnp.float32 and mine[...].shape == other[...].shape


def test_aliases_may_repeat_their_tensor():
    for name, first, other in (
        ("recursive-sequence", "model.layers.3.", "model.layers.5."),
        ("recursive-middle_sequence", "model.layers.4.", "model.layers.6."),
        ("expert", "model.layers.1.block.0.", "model.layers.3.block.0."),
        ("token", "model.layers.1.block_list.0.1.", "model.layers.1.block_list.2.1."),
    ):
        config = CONFIGS[name]
        tensors = oracle.random_tensors(config, 0)
        more = {k.replace(first, other): np.array(v) for k, v in tensors.items() if k.startswith(first)}
        assert more
        more["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        back = to_official("mor", from_official("mor", tensors | more, config))
        assert set(back) == set(tensors)
        changed = next(k for k in more if k.startswith(other))
        with pytest.raises(UserError, match=r"another name of model\.layers"):
            from_official("mor", tensors | more | {changed: more[changed] + 1}, config)


def test_a_recursive_model_may_have_a_head_of_its_own():
    config = CONFIGS["recursive-cycle"]
    tensors = oracle.random_tensors(config, 0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1]
    untied = copy.deepcopy(config)
    untied["llama"]["tie_word_embeddings"] = False
    want = oracle.forward(tensors, untied, row())["logits"]
    np.testing.assert_allclose(from_official("mor", tensors, config)(row()).logits, want, atol=2e-5, rtol=2e-6)
    with pytest.raises(UserError, match=r"lm_head\.weight is another name of model\.embed_tokens\.weight"):
        vanilla = CONFIGS["vanilla"]
        from_official("mor", oracle.random_tensors(vanilla, 0) | {"lm_head.weight": jnp.ones((64, 32))}, vanilla)


def test_wide_router_is_as_wide_as_its_tensors():
    config = CONFIGS["expert-wide"]
    tensors = oracle.random_tensors(config, 0)
    for p in (1, 2):
        for index, shape in ((0, (128, 32)), (2, (1, 128))):
            value = np.random.default_rng(p).standard_normal(shape) / np.sqrt(shape[1])
            tensors[f"model.layers.{p}.mor_router.router.{index}.weight"] = jnp.asarray(value, jnp.float32)
    model = from_official("mor", tensors, config)
    assert model.settings.body.depth.network == "wide_mlp"
    want = oracle.forward(tensors, config, row())
    np.testing.assert_allclose(model(row()).logits, want["logits"], atol=2e-5, rtol=2e-6)


def test_token_choice_by_cycle_may_omit_its_place():
    config = CONFIGS["token-cycle"]
    tensors = oracle.random_tensors(config, 0)
    bare = {k.replace("model.layers.0.", "model.layers."): v for k, v in tensors.items()}
    assert set(bare) != set(tensors)
    assert set(to_official("mor", from_official("mor", bare, config))) == set(tensors)


def broken(change):
    tensors = oracle.random_tensors(CONFIGS["expert"], 0)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight \[32\] is missing"),
        (
            lambda t: t.update({"model.layers.1.mor_router.w": t.pop("model.layers.1.mor_router.router.weight")}),
            r"mor_router\.router\.weight \[1, 32\] is missing.*unknown model\.layers\.1\.mor_router\.w",
        ),
        (
            lambda t: t.update({"model.layers.1.block.7.mlp.up_proj.weight": t["model.norm.weight"]}),
            r"model\.layers\.1\.block\.7\.mlp\.up_proj\.weight is unknown.*model\.layers\.1\.block",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.down_proj.weight": jnp.zeros((48, 32))}),
            r"model\.layers\.0\.mlp\.down_proj\.weight has shape \[48, 32\], expected \[32, 48\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        from_official("mor", broken(change), CONFIGS["expert"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("llama", None, "section llama is missing"),
        ("llama.vocab_size", None, r"llama\.vocab_size is missing"),
        ("llama.hidden_size", "32", r"llama\.hidden_size is '32'; it must be an integer"),
        ("llama.rope_scaling", {"type": "linear"}, r"llama\.rope_scaling=.* is not supported"),
        ("recursive.ln_share", False, "ln_share=false"),
        ("recursive.sharing", "spiral", "known: cycle, sequence, middle_cycle, middle_sequence"),
        ("recursive.sharing", "sequence", "use cycle or middle_cycle"),
        ("recursive.enable", False, r"mor\.enable needs recursive\.enable"),
        ("recursive.num_recursion", 7, "does not divide the depth"),
        ("mor.type", "expert_choice", "known: expert, token"),
        ("mor.capacity", "1.0,half", "must be 3 fractions"),
        ("mor.capacity", "1.0,0.5", "2 fractions"),
        ("mor.expert.sampling", "threshold", "known: aux_loss, aux_router, null"),
        ("mor.expert", None, r"section mor\.expert is missing"),
    ],
)
def test_configurations_that_do_not_fit(path, value, message):
    config = copy.deepcopy(CONFIGS["expert"])
    *sections, key = path.split(".")
    inner = functools.reduce(lambda d, k: d[k], sections, config)
    inner[key] = value
    with pytest.raises(UserError, match=message):
        config_from_official(config)


def test_one_recursion_needs_its_depth():
    config = oracle.official(6, recursive={"num_recursion": 1, "sharing": "cycle"}, mor={"enable": False})
    with pytest.raises(UserError, match="base_depth is missing"):
        config_from_official(config)


def test_unknown_kind():
    with pytest.raises(UserError, match=r"unknown kind 'mro'.*did you mean mor"):
        from_official("mro", {}, {})
