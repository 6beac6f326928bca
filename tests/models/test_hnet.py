"""H-Nets of one to three chunking stages: shapes, wiring, packing, capacities, causality, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import BATCH, SEQ, WIDTHS, forward, hnet, random_bytes, split_model

from adaptive.errors import RecipeError
from adaptive.layers.call import Call
from adaptive.layers.chunkers import BEGIN, dynamic, similarity, stride
from adaptive.layers.where import Where
from adaptive.models.bodies import hnet as bodies

pytestmark = pytest.mark.compiles

LENGTHS = [7, 11, 6]
SEGMENTS = np.repeat([1, 2, 3], LENGTHS)[None].repeat(BATCH, 0).astype(np.int32)
TIGHT = {1: (0.3,), 2: (0.3, 1.0)}  # 8 slots for the chunks of 24 bytes


@pytest.fixture(scope="module")
def tokens():
    return random_bytes()


def stage_masks(out) -> list[np.ndarray]:
    return [np.asarray(stage.boundary_mask) for stage in out.trace.stages]


def over_bytes(masks: list[np.ndarray], row: int) -> np.ndarray:
    """Positions of one row's bytes that begin a chunk of the innermost stage."""
    positions = np.arange(SEQ)
    for mask in masks:
        positions = positions[mask[row, : len(positions)]]
    return positions


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_shapes_and_trace(stages, tokens):
    config = hnet(stages)
    out = forward(config)(tokens)
    assert out.hidden.shape == (BATCH, SEQ, WIDTHS[stages][0])
    assert out.logits.shape == (BATCH, SEQ, 256) and out.logits.dtype == jnp.float32
    assert len(out.trace.stages) == stages
    masks, exists = stage_masks(out), np.ones((BATCH, SEQ), bool)
    for s, (stage, mask) in enumerate(zip(out.trace.stages, masks, strict=True)):
        np.testing.assert_array_equal(stage.valid, exists)
        assert np.all(mask[:, 0]) and not np.any(mask & ~exists) and not np.any(stage.demoted)
        np.testing.assert_array_equal(mask, (np.asarray(stage.boundary_prob) > 0.5) & exists)
        exists = np.arange(SEQ) < mask.sum(1, keepdims=True)
        np.testing.assert_array_equal(stage.selection.valid, exists)
        assert out.trace.scalars[f"kept_{s}"] == pytest.approx(mask.sum() / np.asarray(stage.valid).sum())
    for row in range(BATCH):
        inner = over_bytes(masks, row)
        assert np.flatnonzero(out.trace.depth[row]).tolist() == inner.tolist()
    assert np.asarray(out.trace.depth).max() == 1
    if stages:
        assert out.trace.scalars["chunks_per_byte"] == pytest.approx(np.asarray(out.trace.depth).mean())


def test_a_ratio_loss_for_every_learned_stage(tokens):
    learned = [dynamic.Settings(2.0, 0.5), stride.Settings(3), similarity.Settings(4.0, 0.5)]
    config = hnet(3, chunker=tuple(learned))
    out = forward(config)(tokens)
    assert set(out.aux) == {"ratio_loss_0", "ratio_loss_2"}
    for s, n in ((0, 2.0), (2, 4.0)):
        stage = out.trace.stages[s]
        exists = np.asarray(stage.valid)
        f, g = np.asarray(stage.boundary_mask)[exists].mean(), np.asarray(stage.boundary_prob)[exists].mean()
        want = n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
        assert out.aux[f"ratio_loss_{s}"].value == pytest.approx(want, rel=1e-5)
        assert out.trace.scalars[f"ratio_loss_global_{s}"] == pytest.approx(want, rel=1e-5)
    assert out.aux.total() == pytest.approx(0.5 * sum(float(aux.value) for aux in out.aux.values()), rel=1e-5)


def applied(stack, x):
    """The stack's output on whole rows x [batch, n, width]."""
    return stack(x, Where.whole(x.shape[:2]), Call())[0]


@pytest.mark.parametrize("merge", ["boundary", "sum"])
def test_one_stage_is_its_parts_put_together(merge, tokens):
    """Each row by itself: the main network sees a sequence of exactly its chunks."""
    config = hnet(merge=merge)
    out = forward(config)(tokens)
    model = nnx.merge(*split_model(config))
    stage = model.body
    h = np.asarray(applied(stage.encoder, model.embedding[...][tokens]), np.float64)
    y = h @ np.asarray(stage.residual.weight[...]) + np.asarray(stage.residual.bias[...])
    for row in range(BATCH):
        positions = np.flatnonzero(out.trace.stages[0].boundary_mask[row])
        chunks = h[row, positions]
        if merge == "sum":
            begins = [0, *(positions[:-1] + 1)]
            chunks = np.stack([h[row, a : b + 1].sum(0) for a, b in zip(begins, positions, strict=True)])
        pad = np.broadcast_to(stage.pad[...], (len(positions), 4))
        wide = jnp.asarray(np.concatenate([chunks, pad], axis=1)[None], jnp.float32)
        z = np.asarray(applied(stage.inner.stack, wide)[0], np.float64)[:, :8]
        value, at = np.zeros(8), -1
        for t in range(SEQ):
            if t in positions:
                at += 1
                p = np.clip(float(out.trace.stages[0].boundary_prob[row, t]), 1e-4, 1 - 1e-4)
                value = p * z[at] + (1 - p) * value
            y[row, t] += value
    want = applied(stage.decoder, jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(out.hidden, want, atol=2e-4)


# Packing and capacities


@pytest.mark.parametrize("stages", [1, 3])
def test_a_packed_document_has_the_logits_it_has_alone(stages, tokens):
    run = forward(hnet(stages))
    packed = run(tokens, segment_ids=SEGMENTS)
    alone = run(np.roll(tokens, -7, axis=1))  # the second document comes first; what follows is the future
    np.testing.assert_allclose(packed.logits[:, 7:18], alone.logits[:, :11], atol=1e-4)
    if stages:
        assert np.all(np.asarray(packed.trace.stages[0].boundary_mask)[:, [0, 7, 18]])


@pytest.mark.parametrize(
    "settings", [{"merge": "sum"}, {"chunker": "stride", "target": 4.0}, {"chunker": "space"}], ids=str
)
def test_other_chunkers_keep_documents_apart_too(settings, tokens):
    run = forward(hnet(**settings))
    packed, alone = run(tokens, segment_ids=SEGMENTS), run(np.roll(tokens, -7, axis=1))
    np.testing.assert_allclose(packed.logits[:, 7:18], alone.logits[:, :11], atol=1e-4)


def test_padding_is_a_shorter_sequence(tokens):
    """Row 0 has 24 bytes, row 1 has 9: each is as long as it is, and losses see nothing else."""
    run = forward(hnet(2))
    whole, valid = run(tokens), np.arange(SEQ) < np.array([[24], [9]])
    padded = run(np.where(valid, tokens, 65), valid=valid)
    np.testing.assert_allclose(padded.logits[0], whole.logits[0], atol=1e-4)
    np.testing.assert_allclose(padded.logits[1, :9], whole.logits[1, :9], atol=1e-4)
    first = padded.trace.stages[0]
    assert not np.any(np.asarray(first.boundary_mask) & ~valid) and not np.any(np.asarray(padded.trace.depth)[~valid])
    f, g = (np.asarray(a)[valid].mean() for a in (first.boundary_mask, first.boundary_prob))
    assert padded.aux["ratio_loss_0"].value == pytest.approx(1.5 * (2 * f * g + (1 - f) * (1 - g)), rel=1e-5)
    assert padded.trace.scalars["chunks_per_byte"] == pytest.approx(np.asarray(padded.trace.depth).sum() / 33)
    same = run(np.where(valid, tokens, 65), segment_ids=valid.astype(np.int32))
    np.testing.assert_allclose(padded.logits, same.logits, atol=1e-6)


@pytest.mark.parametrize("packing", ["row", "device"])
def test_capacity_for_all_is_no_capacity(packing, tokens):
    """With 16 of 24 slots in each row, or 32 for two rows together."""
    config = hnet(2, capacities=(0.67, 1.0), packing=packing)
    out, want = (forward(c)(tokens, segment_ids=SEGMENTS) for c in (config, hnet(2)))
    selection = out.trace.stages[0].selection.indices
    assert selection.shape == ((2, 16) if packing == "row" else (1, 32))
    assert out.trace.scalars["overflow_0"] == out.trace.scalars["overflow_1"] == 0
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-4)
    np.testing.assert_array_equal(out.trace.depth, want.trace.depth)
    assert out.trace.scalars.keys() == want.trace.scalars.keys()
    for name, value in want.trace.scalars.items():
        np.testing.assert_allclose(out.trace.scalars[name], value, rtol=1e-5, err_msg=name)


def test_rows_packed_per_device_lend_each_other_slots(tokens):
    """Row 0 takes a chunk at every byte, row 1 at three: 32 slots for both are enough, 16 for each are not."""
    given = np.zeros((BATCH, SEQ), bool)
    given[0], given[1, [0, 5, 11]] = True, True
    settings = {"chunker": "words", "capacities": (0.67,)}
    together, apart, want = (
        forward(hnet(**s))(tokens, boundaries=given)
        for s in ({**settings, "packing": "device"}, settings, {"chunker": "words"})
    )
    np.testing.assert_allclose(together.logits, want.logits, atol=1e-4)
    assert together.trace.scalars["overflow_0"] == 0 and apart.trace.scalars["overflow_0"] == pytest.approx(8 / 27)
    np.testing.assert_allclose(apart.logits[:, :16], want.logits[:, :16], atol=1e-4)
    assert np.abs(apart.logits[0, 17:] - want.logits[0, 17:]).max() > 1e-2


def test_threshold_knows_no_capacity(tokens):
    tight = hnet(2, capacities=TIGHT[2])
    got, want = forward(tight, selection="threshold")(tokens), forward(hnet(2))(tokens)
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    limited = forward(tight)(tokens)
    assert limited.trace.scalars["overflow_0"] > 0 and np.abs(limited.logits - want.logits).max() > 1e-2
    assert nnx.merge(*split_model(tight)).selections() == ("topk", "threshold")
    assert nnx.merge(*split_model(hnet(2))).selections() == ("topk",)


# Causality

CASES = {
    "no chunking": hnet(0),
    **{f"{n} stages": hnet(n) for n in (1, 2, 3)},
    "one stage, overflowing": hnet(capacities=TIGHT[1]),
    "sum": hnet(merge="sum", capacities=TIGHT[1]),
    "device": hnet(2, packing="device", capacities=TIGHT[2]),
    "similarity": hnet(chunker="similarity", capacities=TIGHT[1]),
    "stride": hnet(chunker="stride", capacities=(0.2,), target=2.0),
    "space": hnet(chunker="space"),
    "words": hnet(chunker="words", capacities=TIGHT[1]),
    "none": hnet(chunker="none", capacities=TIGHT[1]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_byte_is_blind_to_the_future(name, tokens):
    """One byte of row 1 changes; nothing before it does, in its row or in the one before. So with boundaries too."""
    config, at = CASES[name], 10
    run, other = forward(config), tokens.copy()
    other[1, at] = ord("z") if tokens[1, at] != ord("z") else ord(" ")
    given = [{}, {}]
    if name == "words":
        given = [{"boundaries": np.random.default_rng(2).random((BATCH, SEQ)) < 0.6} for _ in range(2)]
        given[1]["boundaries"] = given[1]["boundaries"].copy()
        given[1]["boundaries"][1, at] ^= True
    a, b = run(tokens, **given[0]), run(other, **given[1])
    np.testing.assert_allclose(a.logits[0], b.logits[0], atol=1e-5)
    np.testing.assert_allclose(a.logits[1, :at], b.logits[1, :at], atol=1e-5)
    np.testing.assert_array_equal(a.trace.depth[1, :at], b.trace.depth[1, :at])
    assert np.abs(a.logits - b.logits)[1, at:].max() > 1e-2
    if config.body.kind() == "hnet" and config.body.capacities:
        assert any(np.any(stage.demoted) for stage in a.trace.stages), "the example should overflow"


def test_the_last_byte_reads_the_first_through_the_chunks(tokens):
    """With Mamba-2 outside limited to its convolution, what reaches far went through the main network."""
    other = tokens.copy()
    other[:, 0] = ord("q")
    for stages in (1, 2):
        a, b = (forward(hnet(stages))(t).logits for t in (tokens, other))
        assert np.abs(a - b)[:, -1].max() > 1e-3


# Training


@functools.cache
def gradients(config: shapes.Model, remat: str = "none", packed: bool = False):
    """(loss, gradients) of a scalar that all logits and auxiliary losses enter."""
    graphdef, state = split_model(config, remat=remat)
    tokens = random_bytes()

    def loss(state):
        arrays = {"segment_ids": SEGMENTS} if packed else {}
        if config.body.chunker.kind() == "words":
            arrays["boundaries"] = np.random.default_rng(2).random((BATCH, SEQ)) < 0.4
        out = nnx.merge(graphdef, state)(tokens, deterministic=False, key=jax.random.key(3), **arrays)
        return (out.logits * jnp.cos(jnp.arange(out.logits.size).reshape(out.logits.shape))).mean() + out.aux.total()

    return jax.jit(jax.value_and_grad(loss))(state)


GRADIENTS = {
    "noise and sums": (hnet(chunker="similarity", merge="sum", capacities=TIGHT[1]), True),
    "device": (hnet(2, packing="device", capacities=TIGHT[2]), True),
    "words": (hnet(chunker="words"), False),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_parameter_has_a_finite_gradient(name):
    config, packed = GRADIENTS[name]
    loss, grads = gradients(config, packed=packed)
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), jax.tree_util.keystr(path)


def test_recomputing_layers_changes_nothing():
    config, _ = GRADIENTS["words"]
    (loss, grads), (want_loss, want) = gradients(config, remat="layer"), gradients(config)
    assert loss == pytest.approx(float(want_loss), rel=1e-6)
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


def test_a_single_slot(monkeypatch, tokens):
    """All boundaries but the first are demoted: every byte reads the first chunk, and learning goes on."""
    monkeypatch.setattr(bodies.Settings, "capacity", lambda self, positions: 1)
    config = hnet(2, capacities=(0.01, 0.02))  # of its own, so that nothing compiled is met
    out = forward(config)(tokens)
    assert [np.asarray(mask).sum(1).tolist() for mask in stage_masks(out)] == [[1, 1], [1, 1]]
    wanted = np.asarray(out.trace.stages[0].boundary_mask | out.trace.stages[0].demoted)
    np.testing.assert_array_equal(wanted, np.asarray(out.trace.stages[0].boundary_prob) > 0.5)
    assert out.trace.scalars["overflow_0"] == pytest.approx(1 - 2 / wanted.sum())
    assert np.isfinite(out.logits).all() and np.array_equal(out.trace.depth, np.eye(1, SEQ, dtype=int).repeat(2, 0))
    other = tokens.copy()
    other[:, 12] = ord("z")
    np.testing.assert_allclose(forward(config)(other).logits[:, :12], out.logits[:, :12], atol=1e-5)
    _, grads = gradients(config)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))


def test_noise_in_training_alone(tokens):
    config = hnet(chunker=similarity.Settings(flip_temperature=2.0))
    run = forward(config, deterministic=False)
    masks = [stage_masks(run(tokens, key=jax.random.key(i)))[0] for i in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.any(masks[0] != masks[2])
    calm = forward(config)(tokens).trace.stages[0]
    np.testing.assert_array_equal(calm.boundary_mask, np.asarray(calm.boundary_prob) >= 0.5)


def test_stages_draw_their_own_noise():
    config = hnet(2, chunker=similarity.Settings(flip_temperature=1.0))
    tokens = np.full((1, SEQ), ord("a"), np.int32)
    out = forward(config, deterministic=False)(tokens, key=jax.random.key(0))
    assert not np.array_equal(*(np.asarray(stage.boundary_mask)[0, 1:6] for stage in out.trace.stages))


def test_decisions_and_logits_are_float32_in_half_precision(tokens):
    graphdef, state = split_model(hnet(2), dtype=jnp.bfloat16)
    out = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    for stage in out.trace.stages:
        assert stage.boundary_prob.dtype == stage.selection.weights.dtype == jnp.float32
    want = forward(hnet(2))(tokens)
    assert np.abs(out.trace.stages[0].boundary_prob - want.trace.stages[0].boundary_prob).mean() < 0.02


# Rules


def test_a_rule_decides_alone(tokens):
    """No ratio loss, no smoothing, and boundaries where the rule says."""
    out = forward(hnet(chunker="stride", target=4.0))(tokens)
    assert not out.aux
    assert np.array_equal(stage_masks(out)[0], np.broadcast_to(np.arange(SEQ) % 4 == 0, (BATCH, SEQ)))
    begun = tokens.copy()
    begun[:, 13] = BEGIN
    assert np.all(stage_masks(forward(hnet(chunker="space"))(begun))[0][:, 13])


def test_positions_given_count_for_strides(tokens):
    """Windows of a document that go on where the last one ended."""
    out = forward(hnet(chunker="stride", target=4.0))(
        tokens, positions=np.arange(3, 3 + SEQ, dtype=np.int32)[None].repeat(BATCH, 0)
    )
    mask = stage_masks(out)[0]
    assert np.flatnonzero(mask[0]).tolist() == [0, *range(1, SEQ, 4)]


def test_words_need_boundaries(tokens):
    with pytest.raises(RecipeError, match=r"data\.boundaries=words"):
        forward(hnet(chunker="words"))(tokens)


def test_tied_embeddings_are_the_head(tokens):
    config = hnet(1, tie_embeddings=True)
    out = forward(config)(tokens)
    model = nnx.merge(*split_model(config))
    assert model.head is None
    np.testing.assert_allclose(out.logits, np.asarray(out.hidden) @ np.asarray(model.embedding[...]).T, atol=1e-4)


# Settings


def test_capacities_are_shares_in_multiples():
    def capacity(share, positions):
        return bodies.Settings(capacities=(share,)).capacity(positions)

    assert [capacity(c, 32) for c in (0.01, 0.25, 0.26, 0.5, 1.0)] == [8, 8, 8, 16, 32]
    assert [capacity(c, 2048) for c in (0.05, 0.25, 0.26, 1.0)] == [104, 512, 544, 2048]
    assert (capacity(1 / 6, 1024), capacity(0.29, 1024), capacity(0.29, 8192)) == (176, 304, 2432)
    assert capacity(0.9, 5) == 5 and capacity(0.9, 140) == 128
    assert bodies.Settings().capacity(100) == 100


def test_capacities_change_at_their_steps():
    inner = shapes.with_body(hnet(1), capacities=(0.6, 0.3), capacity_steps=(100,)).body
    model = shapes.with_body(hnet(2), capacities=(0.9, 0.8, 0.7), capacity_steps=(50, 150), inner=inner, inner_width=8)
    assert model.body.changes() == (50, 100, 150)
    found = {step: model.at_step(step).body for step in (0, 49, 50, 100, 149, 150, -1)}
    assert {step: (*body.capacities, *body.inner.capacities) for step, body in found.items()} == {
        0: (0.9, 0.6), 49: (0.9, 0.6), 50: (0.8, 0.6), 100: (0.8, 0.3), 149: (0.8, 0.3),
        150: (0.7, 0.3), -1: (0.7, 0.3),
    }  # fmt: skip
    assert not any(stage.capacity_steps for body in found.values() for stage in body.stages()[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 16, 12)}, r"model.body.inner.inner_width=12: narrower than the 16 around it"),
        ({"widths": (9, 12, 12)}, r"model.body.decoder.blocks.0.mixer.expand \* width = 18 is not .* nearest width: 8"),
        ({"rotary_dim": 3}, r"model.body.encoder.blocks.0.mixer.rotary_dim=3: must be even"),
        ({"rotary_dim": 8}, r"rotary_dim=8: must be even and at most .*head_dim=4"),
        ({"window": -2}, r"window=-2: must be at least 0"),
        ({"hidden": 0}, r"feed_forward.hidden=0: must be at least 1"),
        ({"chunker": ("dynamic", "space")}, r"inner.chunker=space: it reads bytes, so it is for the outermost"),
        ({"chunker": ("words", "words")}, r"inner.chunker=words: it reads boundaries"),
        ({"target": (3.0, 1.0)}, r"model.body.inner.chunker.target=1.0: must be above 1"),
        ({"capacities": (0.5, 0.0)}, r"model.body.inner.capacities=0.0: must be above 0 and at most 1"),
        ({"rates": (1.0, 0.0, 1.0)}, r"model.body.inner.rate=0.0: must be above 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_say_where(change, message):
    with pytest.raises(RecipeError, match=message):
        hnet(2, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacities": (0.6, 0.8)}, r"capacities has 2 shares; the 1 phases .*about 1.5 / 3 = 0.50"),
        ({"capacities": (0.6,), "capacity_steps": (10,)}, r"capacities has 1 shares; the 2 phases"),
        ({"capacities": (0.6,) * 3, "capacity_steps": (10, 10)}, r"capacity_steps=10,10: must rise"),
    ],
)
def test_schedules_that_cannot_be(change, message):
    with pytest.raises(RecipeError, match=message):
        shapes.with_body(hnet(1), **change)
