"""Released H-Net weights in our model, against the oracle and recorded gradients; and the way back."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import hnet as oracle

from adaptive.errors import UserError
from adaptive.interop import from_official, to_official
from adaptive.interop.official_hnet import official_layout
from adaptive.interop.official_hnet_config import config_from_official, config_to_official
from adaptive.interop.tensors import built
from adaptive.layers.chunkers import stride
from adaptive.layers.feed_forwards import dense
from adaptive.models.bodies import recursive
from adaptive.models.language_model import LanguageModel
from adaptive.settings import with_leaf

pytestmark = pytest.mark.compiles

CONFIGS = oracle.configs()
# Gradients where a letter, a depth or an option is new; of the rest, values alone.
GRADIENTS = {"one-same-width", "one-hybrid", "one-lists", "two-widening", "three"}
# Optimised little, because compiling is most of the time here.


def cross_entropy(logits, rows):
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, rows[:, 1:, None], axis=-1).mean()


@functools.cache
def case(name):
    """(configuration with the recorded ratio targets, tensors, batch, what the oracle makes of each row)."""
    batch = oracle.recorded(name)
    config = CONFIGS[name] | {"ratio_targets": batch.targets}
    tensors = oracle.random_tensors(config, batch.seed)
    want = [oracle.forward(tensors, config, row) for row in batch.rows]
    assert min(out.margin for out in want) > 1e-3, "choose another seed: boundaries are decided by rounding"
    return config, tensors, batch, want


def chunking(settings):
    """Settings of the stages that chunk, from the outside in."""
    return settings.body.stages()[:-1]


def check_stages(trace, row, want):
    """The routers' decisions about a row are the oracle's: boundaries exactly, probabilities to rounding."""
    assert len(trace.stages) == len(want.stages)
    for mine, theirs in zip(trace.stages, want.stages, strict=True):
        valid = np.asarray(mine.valid[row])
        np.testing.assert_array_equal(np.asarray(mine.boundary_mask[row])[valid], theirs.mask)
        np.testing.assert_allclose(np.asarray(mine.boundary_prob[row])[valid], theirs.prob, atol=1e-5)
        assert not np.asarray(mine.demoted).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_oracle(name):
    config, tensors, batch, want = case(name)
    rows = jnp.asarray(batch.rows, jnp.int32)

    def loss(tensors):
        out = from_official("hnet", tensors, config)(rows, deterministic=False)
        return cross_entropy(out.logits, rows) + out.aux.total(), out

    graded = name in GRADIENTS
    run = jax.value_and_grad(loss, has_aux=True) if graded else lambda tensors: (loss(tensors), None)
    (total, out), grads = jax.jit(run)({key: jnp.asarray(v) for key, v in tensors.items()})
    assert out.logits.dtype == jnp.float32
    for i, theirs in enumerate(want):
        check_stages(out.trace, i, theirs)
        np.testing.assert_allclose(out.logits[i], theirs.logits, atol=1e-4, rtol=0)
    ratios = oracle.ratio_losses(want, batch.targets)
    assert set(out.aux) == {f"ratio_loss_{s}" for s in range(len(ratios))}
    for s, value in enumerate(ratios):
        np.testing.assert_allclose(out.aux[f"ratio_loss_{s}"].value, value, atol=1e-5)
        assert out.aux[f"ratio_loss_{s}"].coefficient == batch.weight
    np.testing.assert_allclose(total, batch.loss, atol=1e-5)
    assert grads is None or set(grads) == set(batch.gradients)
    for key, sampled in batch.gradients.items() if graded else ():
        mine = np.asarray(grads[key]).reshape(-1)
        np.testing.assert_allclose(np.abs(mine).max(), batch.largest[key], rtol=1e-4, err_msg=key)
        atol = 1e-4 * batch.largest[key]
        np.testing.assert_allclose(mine[oracle.sample(mine.size)], sampled, atol=atol, rtol=0, err_msg=key)


# Lengths of the sequences of a row; what is left of it is padding.
PACKED = ((7, 12, 1), (20,), (3, 9))


@pytest.mark.parametrize("name", ["one-lists", "three"])
def test_packed_sequences_are_separate_ones(name):
    config, tensors, batch, _ = case(name)
    rows = np.random.default_rng(3).integers(0, 40, (len(PACKED), 20), dtype=np.int32)
    ids = np.zeros_like(rows)
    pieces = []
    for i, lengths in enumerate(PACKED):
        start = 0
        for number, length in enumerate(lengths, 1):
            ids[i, start : start + length] = number
            pieces.append((i, start, start + length))
            start += length
    model = from_official("hnet", tensors, config)
    out = jax.jit(lambda m, t, s: m(t, segment_ids=s))(model, rows, ids)
    want = [oracle.forward(tensors, config, rows[i, first:last]) for i, first, last in pieces]
    assert min(w.margin for w in want) > 1e-5
    for (i, first, last), theirs in zip(pieces, want, strict=True):
        np.testing.assert_allclose(out.logits[i, first:last], theirs.logits, atol=1e-4, rtol=0)
    for i in range(len(PACKED)):  # sequences of a row follow one another at every stage
        mine = [w for (row, _, _), w in zip(pieces, want, strict=True) if row == i]
        joined = [
            oracle.Stage(*(np.concatenate(parts) for parts in zip(*stages, strict=True)))
            for stages in zip(*(w.stages for w in mine), strict=True)
        ]
        check_stages(out.trace, i, oracle.Output(np.zeros(0), joined))
    for s, value in enumerate(oracle.ratio_losses(want, batch.targets)):  # padding is no position of any
        np.testing.assert_allclose(out.aux[f"ratio_loss_{s}"].value, value, atol=1e-5)


@pytest.mark.parametrize("name", ["one-hybrid", "three"])
def test_decoding_byte_by_byte(name):
    """A prompt of other length in each row, then one byte at a time, chunks beginning at different times."""
    config, tensors, batch, want = case(name)
    rows, seq = jnp.asarray(batch.rows, jnp.int32), batch.rows.shape[1]
    model = from_official("hnet", tensors, config)
    prefill = jax.jit(lambda m, t, c, v: m.prefill(t, c, v))
    step = jax.jit(lambda m, t, c: m.decode_step(t, c))
    for lengths in ((9, 4), (0, 0)):
        cache = model.init_cache(2, seq + 9)
        if any(lengths):
            prompt = jnp.stack([jnp.where(jnp.arange(9) < n, rows[i, :9], 0) for i, n in enumerate(lengths)])
            out, cache = prefill(model, prompt, cache, jnp.arange(9) < jnp.asarray(lengths)[:, None])
            for i, n in enumerate(lengths):
                np.testing.assert_allclose(out.logits[i, :n], want[i].logits[:n], atol=1e-4, rtol=0)
        for t in range(seq - max(lengths)):
            at = np.array(lengths) + t
            out, cache = step(model, rows[np.arange(2), at], cache)
            for i in range(2):
                np.testing.assert_allclose(out.logits[i, 0], want[i].logits[at[i]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    config = CONFIGS[name]
    tensors = oracle.random_tensors(config, 1)
    model = from_official("hnet", tensors, config)
    back = to_official("hnet", model)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert config_from_official(config_to_official(model.settings)) == model.settings


def test_loaded_model_is_an_ordinary_one():
    """The same tree of parameters, shapes and axes as a model drawn from a key; half precision goes in."""
    config = CONFIGS["two-widening"]
    tensors = {k: v.astype(np.float16) for k, v in oracle.random_tensors(config, 0).items()}
    loaded = from_official("hnet", tensors, config)
    fresh = nnx.eval_shape(lambda: config_from_official(config).build(jax.random.key(0)))
    assert isinstance(loaded, LanguageModel) and nnx.graphdef(loaded) == nnx.graphdef(fresh)
    assert [stage.capacities for stage in chunking(loaded.settings)] == [(), ()]  # no limit on chunks
    pairs = zip(nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(fresh)), strict=True)
    for (path, mine), (same, other) in pairs:
        assert path == same and mine.get_metadata() == other.get_metadata()
        assert mine[...].dtype == jnp.float32 and mine[...].shape == other.shape


def test_a_tied_model_may_repeat_its_embedding():
    config = CONFIGS["one-same-width"]
    tensors = oracle.random_tensors(config, 0)
    back = to_official(
        "hnet", from_official("hnet", tensors | {"lm_head.weight": tensors["embeddings.weight"]}, config)
    )
    assert set(back) == set(tensors)
    with pytest.raises(UserError, match=r"lm_head\.weight is another name of embeddings\.weight"):
        from_official("hnet", tensors | {"lm_head.weight": tensors["embeddings.weight"] + 1}, config)


@pytest.mark.parametrize(
    ("layout", "widths", "ff", "count"),
    [
        (["m4", ["T22"], "m4"], [1024, 1536], [0, 4096], 679_405_312),
        (["m4", ["T24"], "m4"], [1024, 2048], [0, 5504], 1_270_833_920),
        (["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096], 874_315_264),
        (["m4", ["T1m4", ["T27"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_603_492_224),
        (["m4", ["T1m4", ["T30"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_755_285_888),
        (["m4", ["T1m4", ["T28"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_654_090_112),
    ],
)
def test_released_sizes(layout, widths, ff, count):
    """The release's own configurations, read without drawing a parameter."""
    stages = len(widths)
    config = {
        "arch_layout": layout, "d_model": widths, "d_intermediate": ff, "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": {"num_heads": [16] * stages, "rotary_emb_dim": [w // 32 for w in widths],
                     "window_size": [1023] * (stages - 1) + [-1]},
        "tie_embeddings": False,
    }  # fmt: skip
    model = nnx.eval_shape(lambda: config_from_official(config).build(jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert [stage.chunker.target for stage in chunking(model.settings)] == ([6.0] if stages == 2 else [3.0, 3.0])


def broken(change):
    tensors = oracle.random_tensors(CONFIGS["two"], 0)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight \[40, 16\] is missing"),
        (
            lambda t: t.update({"backbone.encoder.layers.1.mixer.A": t.pop("backbone.encoder.layers.1.mixer.A_log")}),
            r"layers\.1\.mixer\.A_log \[4\] is missing.*unknown backbone\.encoder\.layers\.1\.mixer\.A",
        ),
        (
            lambda t: t.update({"backbone.encoder.layers.2.norm1.weight": t["lm_head.weight"]}),
            r"backbone\.encoder\.layers\.2\.norm1\.weight is unknown.*backbone\.encoder\.layers\.",
        ),
        (
            lambda t: t.update({"backbone.residual_proj.bias": np.zeros(17)}),
            r"backbone\.residual_proj\.bias has shape \[17\], expected \[16\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        from_official("hnet", broken(change), CONFIGS["two"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("d_model", None, "d_model is missing"),
        ("d_modell", [16], r"d_modell is unknown; did you mean d_model\?"),
        ("ssm_cfg.headdims", 64, r"ssm_cfg\.headdims is unknown; did you mean headdim\?"),
        ("attn_cfg.window_size", None, r"attn_cfg\.window_size is missing"),
        ("attn_cfg", [1], "attn_cfg must be a dict"),
        ("d_model", [16, 24], "d_model=.* must be a list of 3 integers"),
        ("d_model", [16, 16, 24.0], "d_model has 24.0; it must be integers"),
        ("d_model", [24, 16, 24], "must not shrink inwards"),
        ("ssm_cfg.d_state", [8, 8], r"ssm_cfg\.d_state=\[8, 8\] must be a list of 3"),
        ("ssm_cfg.headdim", 7, "is not a multiple of"),
        ("d_intermediate", [0, 0, 128], "has a feed-forward"),
        ("arch_layout", ["m2", ["T1"]], "arch_layout at the top: a list of 2"),
        ("arch_layout", ["m2", ["x4"], "m2"], "no block"),
        ("arch_layout", ["m2", ["model"], "m2"], r"arch_layout at \[1\]\[0\].* cannot read 'model'"),
        ("attn_cfg.num_heads", [2, 3, 3], "letter T: width 16 is not a multiple of the 3 attention heads"),
        ("attn_cfg.rotary_emb_dim", [2, -1, 2], r"attn_cfg\.rotary_emb_dim has -1; it must be integers of at least 0"),
        ("attn_cfg.rotary_emb_dim", [2, 3, 2], "must be even"),
        ("ratio_targets", [3.0], "must be a list of 2 numbers"),
        ("ratio_targets", [3.0, 1.0], "must be above 1"),
    ],
)
def test_configurations_that_do_not_fit(path, value, message):
    config = copy.deepcopy(CONFIGS["two"])
    *sections, key = path.split(".")
    inner = functools.reduce(lambda d, k: d[k], sections, config)
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    with pytest.raises(UserError, match=message):
        config_from_official(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("body.chunker", stride.Settings(4), "chunker=dynamic in every stage, not stride"),
        ("body.merge", "sum", "merge=boundary"),
        ("body.inner", recursive.Settings(), "ends in a stack .*, not recursive"),
        ("body.encoder.stream", "compute", "stream=float32"),
        ("body.decoder.blocks.0.mixer", None, "has blocks of Mamba-2 or of attention"),
        ("body.encoder.blocks.0.mixer.d_state", 24, "of one shape in a stage"),
        ("body.inner.stack.blocks.0.mixer.bias", "all", "has blocks of Mamba-2 or of attention"),
        ("body.inner.stack.blocks.0.feed_forward.hidden", 130, "a multiple of 128 hidden units"),
        ("norm_eps", 1e-6, "norm_eps=1e-05"),
    ],
)
def test_models_without_official_names(path, value, message):
    settings = with_leaf(config_from_official(CONFIGS["one"]), path, value)
    if path.endswith("mixer"):
        settings = with_leaf(settings, "body.decoder.blocks.0.feed_forward", dense.Settings(128))
    model = nnx.eval_shape(lambda: settings.build(jax.random.key(0)))
    with pytest.raises(UserError, match=message):
        to_official("hnet", model)
    with pytest.raises(UserError, match="only a LanguageModel has"):
        to_official("hnet", nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_how_a_stack_is_written_does_not_matter():
    """One block that repeats, a pattern that does, and equal blocks in a row have the same names."""
    config = oracle.official(["m1", ["T1m1T1m1"], "m2"], [16, 16], ff=[0, 128])
    settings, tensors = config_from_official(config), oracle.random_tensors(config, 0)
    pattern = dataclasses.replace(settings.body.inner.stack, blocks=settings.body.inner.stack.blocks[:2], repeats=2)
    twice = with_leaf(settings, "body.inner.stack", pattern)
    twice = with_leaf(twice, "body.decoder.repeats", 1)
    twice = with_leaf(twice, "body.decoder.blocks.0.repeat", 2)
    assert config_to_official(twice) == config_to_official(settings)
    layout = official_layout(twice)
    model = built(twice, layout, {name: jnp.asarray(value) for name, value in tensors.items()})
    back = to_official("hnet", model)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    tokens = np.random.default_rng(0).integers(0, 40, (1, 12))
    want = oracle.forward(tensors, config, tokens[0]).logits
    np.testing.assert_allclose(jax.jit(model)(tokens).logits[0], want, atol=1e-4, rtol=0)


def test_numpy_tokens_eagerly():
    """What the batch gives may be numpy's, and nothing need be compiled."""
    config, tensors, batch, want = case("one")
    model = from_official("hnet", tensors, config)
    rows, n = batch.rows, batch.rows.shape[1]
    lengths = np.array([n, n - 3])
    logits = model(rows, valid=np.arange(n) < lengths[:, None]).logits
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(logits[i, :length], want[i].logits[:length], atol=1e-4, rtol=0)
