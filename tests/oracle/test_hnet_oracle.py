"""The oracle itself: published sizes and identities that hold whatever an implementation does."""

import re

import numpy as np
import pytest

from oracle import hnet

CONFIGS = hnet.configs()


def row(seed: int = 0, seq: int = 20):
    return np.random.default_rng(seed).integers(0, 40, seq)


@pytest.mark.parametrize(
    ("layout", "widths", "ff", "count"),
    [
        (["m4", ["T22"], "m4"], [1024, 1536], [0, 4096], 679_405_312),
        (["m4", ["T24"], "m4"], [1024, 2048], [0, 5504], 1_270_833_920),
        (["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096], 874_315_264),
        (["m4", ["T1m4", ["T27"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_603_492_224),
    ],
)
def test_published_parameter_counts(layout, widths, ff, count):
    config = hnet.official(layout, widths, vocab=256, ff=ff, heads=16, ssm={"d_state": 128, "headdim": 64})
    assert sum(int(np.prod(s)) for s in hnet.tensor_shapes(config).values()) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_causal(name):
    config, tensors = CONFIGS[name], hnet.random_tensors(CONFIGS[name], 0)
    changed = row()
    changed[11] = (changed[11] + 1) % 40
    a, b = (hnet.forward(tensors, config, t) for t in (row(), changed))
    np.testing.assert_allclose(a.logits[:11], b.logits[:11], atol=1e-12, rtol=0)  # products of other sizes round anew
    assert np.abs(a.logits[11:] - b.logits[11:]).max() > 0.01
    np.testing.assert_array_equal(a.stages[0].mask[:11], b.stages[0].mask[:11])
    for stage, outer in zip(a.stages[1:], a.stages, strict=False):
        assert len(stage.mask) == outer.mask.sum() and stage.mask[0] and stage.prob[0] == 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_matters(name):
    """But for a cosine's scale, there is no tensor that could be read wrongly and not be seen."""
    config, tensors = CONFIGS[name], hnet.random_tensors(CONFIGS[name], 0)
    want = hnet.forward(tensors, config, row()).logits
    for key, value in tensors.items():
        other = tensors | {key: np.roll(value, 1, axis=-1) if value.shape[-1] > 1 else value * 1.1}
        assert np.abs(hnet.forward(other, config, row()).logits - want).max() > 1e-5, key


def test_state_space_layer_is_one_matrix():
    """y = (L o C B^T) (dt x) with L_ts = exp(sum of dt A in (s, t]): Mamba-2 paper, section 3."""
    rng, sizes = np.random.default_rng(0), hnet.ssm_sizes(CONFIGS["one"], 0)
    config = hnet.official(["m1"], [16])
    w = {
        name.removeprefix("backbone.main_network.layers.0.mixer."): value.astype(np.float64)
        for name, value in hnet.random_tensors(config, 3).items()
        if ".mixer." in name
    }
    x = rng.standard_normal((9, 16))
    inner, n, heads = sizes["inner"], sizes["d_state"], sizes["heads"]
    z, xbc, dt = np.split(x @ w["in_proj.weight"].T, [inner, 2 * inner + 2 * n], axis=-1)
    padded = np.concatenate([np.zeros((3, xbc.shape[1])), xbc])
    kernel = w["conv1d.weight"][:, 0]
    mixed = sum(padded[j : j + 9] * kernel[:, j] for j in range(4)) + w["conv1d.bias"]
    u, b, c = np.split(mixed / (1 + np.exp(-mixed)), [inner, inner + n], axis=-1)
    dt = np.logaddexp(0, dt + w["dt_bias"])
    total = np.cumsum(-dt * np.exp(w["A_log"]), axis=0)
    decay = np.tril(np.exp(total[:, None] - total[None, :]).transpose(2, 0, 1))
    u = u.reshape(9, heads, -1)
    y = np.einsum("hts,ts,sh,shp->thp", decay, c @ b.T, dt, u) + w["D"][:, None] * u
    y = y.reshape(9, inner) * z / (1 + np.exp(-z))
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * w["norm.weight"] @ w["out_proj.weight"].T
    np.testing.assert_allclose(hnet.mamba(w, x, sizes), y, atol=1e-12)


def test_moving_average_keeps_probabilities_off_their_ends():
    z = np.array([[1.0], [2.0], [4.0]])
    first = 0.9999
    np.testing.assert_allclose(
        hnet.smooth(z, np.array([1.0, 0.75, 0.0])),
        [[first], [0.75 * 2 + 0.25 * first], [0.0001 * 4 + 0.9999 * (0.75 * 2 + 0.25 * first)]],
    )


def test_ties_are_no_boundary_and_a_zero_vector_is_one_half():
    tensors = {f"s.routing_module.{x}_proj_layer.weight": np.eye(2) for x in "qk"}
    found = hnet.route(tensors, "s", np.array([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0], [0.0, 0.0], [3.0, 0.0]]))
    np.testing.assert_array_equal(found.prob, [1.0, 0.5, 1.0, 0.5, 0.5])
    np.testing.assert_array_equal(found.mask, [True, False, True, False, False])


def test_ratio_loss_is_one_at_its_target():
    mask = np.array([True, False, False, True, False, False])
    out = hnet.Output(np.zeros((6, 1)), [hnet.Stage(mask / 1.0, mask)])
    assert hnet.ratio_losses([out], [3.0]) == pytest.approx([1.0])


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_gradients_are_finite_differences(name):
    """The numbers in the fixture come from automatic differentiation of another implementation, in PyTorch; here those
    of the first tensor of each kind are multiplied with the direction they point in and compared with the oracle's
    slope in that direction. (Our model's gradients are compared with those of all.)"""
    config, batch = CONFIGS[name], hnet.recorded(name)
    tensors = hnet.random_tensors(config, batch.seed)
    near = [hnet.forward(tensors, config, r) for r in batch.rows]

    def loss(tensors):
        return hnet.total_loss(tensors, config, batch.rows, batch.targets, batch.weight, near=near)

    assert loss(tensors) == pytest.approx(batch.loss, abs=1e-12)
    first = {re.sub(r"(main_network\.)+|\.\d+", "", key): key for key in reversed(batch.gradients)}
    for key in first.values():
        sampled = batch.gradients[key]
        direction = np.zeros(tensors[key].size)
        # Signs, not the gradient itself, so that no large entry hides the small ones.
        direction[hnet.sample(direction.size)] = np.sign(sampled)
        step = 1e-5 * direction.reshape(tensors[key].shape)
        up, down = (loss(tensors | {key: tensors[key] + sign * step}) for sign in (1.0, -1.0))
        slope = np.abs(sampled.astype(np.float64)).sum()
        np.testing.assert_allclose((up - down) / 2e-5, slope, rtol=1e-4, atol=1e-7, err_msg=key)
