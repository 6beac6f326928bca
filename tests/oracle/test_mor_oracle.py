"""The oracle itself: shapes, counts and identities that hold whatever an implementation does."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import mor

pytestmark = pytest.mark.compiles

CONFIGS = mor.configs()


def tokens(seed: int = 0, batch: int = 2, seq: int = 16):
    return np.random.default_rng(seed).integers(0, 64, (batch, seq), dtype=np.int32)


def test_published_parameter_counts():
    """MoR paper, table of model shapes: 315M vanilla, 118M with three recursions, embeddings apart."""
    llama = {"vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
             "num_key_value_heads": 5, "head_dim": 64}  # fmt: skip
    off = {"enable": False}
    for config, count in (
        (mor.official(32, recursive=off, mor=off, **llama), 314_635_200),
        (mor.official(32, mor=off, **llama), 12 * 9_832_320 + 960),
        (mor.official(32, **llama), 12 * 9_832_320 + 960 + 3 * 960),
        (mor.official(32, mor={"type": "token"}, **llama), 12 * 9_832_320 + 960 + 3 * 960),
    ):
        shapes = mor.tensor_shapes(config)
        assert sum(int(np.prod(s)) for s in shapes.values()) - 49152 * 960 == count


def test_warmup_capacities_are_the_published_ones():
    config = mor.official(8, expert={"cap_warmup_step": 10})
    got = [mor.capacities(config, 48, call)[1:] for call in range(1, 11)]
    assert got == [[47, 47], [46, 44], [44, 41], [42, 36], [40, 32], [37, 27], [35, 22], [33, 19], [32, 16], [32, 16]]
    assert mor.capacities(config, 2048) == [2048, 1365, 682]


@pytest.mark.parametrize("name", ["vanilla", "vanilla-kv-middle_cycle", "recursive-sequence", "token", "token-kv"])
def test_causal(name):
    config, row = CONFIGS[name], tokens()
    tensors = mor.random_tensors(config, 0)
    changed = row.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    a, b = (mor.forward(tensors, config, t)["logits"] for t in (row, changed))
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.abs(a[:, 9:] - b[:, 9:]).max() > 0.01


def test_full_capacity_additive_is_a_residual_recursion():
    """With every token selected and no gate, a step is x + f(x); sharing has no effect within one step."""
    config = mor.official(
        3, recursive={"num_recursion": 1, "base_depth": 3}, mor={"capacity": "1.0"}, expert={"gating": "additive"}
    )
    tensors, row = mor.random_tensors(config, 1), tokens()
    out = mor.forward(tensors, config, row)
    vanilla = mor.official(3, recursive={"enable": False}, mor={"enable": False})
    renamed = {k.replace("layers.1.block.0", "layers.1"): v for k, v in tensors.items()}
    plain = mor.forward(renamed, vanilla, row)
    np.testing.assert_allclose(out["stages"][2], plain["stages"][1] + plain["stages"][2], atol=1e-6)
    shared = copy.deepcopy(config)
    shared["kv_sharing"]["enable"] = True
    np.testing.assert_array_equal(mor.forward(tensors, shared, row)["logits"], out["logits"])


def test_selection_is_nested_and_unselected_tokens_rest():
    config, row = CONFIGS["expert-small-first"], tokens(seq=22)
    out = mor.forward(mor.random_tensors(config, 2), config, row)
    kept = np.ones(row.shape, bool)
    for selected, before, after, k in zip(
        out["selected"], out["stages"][1:], out["stages"][2:], mor.capacities(config, 22), strict=False
    ):
        selected = np.asarray(selected)
        assert (selected.sum(1) == k).all() and not (selected & ~kept).any()
        np.testing.assert_array_equal(before[~selected], after[~selected])
        kept = selected


def test_balanced_choice_has_unit_loss():
    config = CONFIGS["token"]
    tensors = mor.random_tensors(config, 3)
    tensors["model.layers.1.mor_router.router.weight"] = jnp.zeros((3, 32))
    value, _ = mor.forward(tensors, config, tokens())["losses"]["balancing_loss"]
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_gradients_reach_every_trained_tensor():
    config, row = CONFIGS["expert-aux-router"], tokens(seq=12)
    tensors = mor.random_tensors(config, 4)
    grads = jax.grad(lambda t: mor.total_loss(mor.forward(t, config, row), row))(tensors)
    dead = sorted(name for name, g in grads.items() if not np.abs(g).max() > 0)
    assert dead == [f"model.layers.{p}.mlp_router.router.weight" for p in (1, 2)]
