"""The attention layer with its options against the same written out in numpy, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptive.layers.attention import LLAMA, Attention, AttentionOptions, Rows
from adaptive.layers.rope import rope_at
from adaptive.optim.build import decayed

WIDTH, HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 12, 4, 2, 6, 1e-3, 100.0
BATCH, SEQ = 2, 7
OPTIONS = {
    "llama": LLAMA,
    "bias": AttentionOptions(bias=True),
    "head norm": AttentionOptions(qk_norm="head", bias=True),
    "full norm, clipped": AttentionOptions(qk_norm="full", clip_qkv=0.9),
    "clipped": AttentionOptions(clip_qkv=0.5, bias=True),
    "window": AttentionOptions(window=3),
    "window of one": AttentionOptions(window=1),
    "window past the start": AttentionOptions(window=SEQ + 2),
    "all": AttentionOptions(bias=True, qk_norm="head", clip_qkv=1.1, window=4),
}


def attention(options, seed=0):
    """A layer whose parameters, scales and biases included, are all random."""
    layer = Attention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, 0.5, jax.random.key(seed), options=options, norm_eps=EPS)
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), jnp.float32), state))


def written_out(layer, options, x, positions):
    """float64 [n, width] -> [n, width] for one sequence at ascending `positions`."""
    value = lambda p: np.asarray(p[...], np.float64)  # noqa: E731

    def projected(name, heads):
        out = np.einsum("nd,dhe->nhe", x, value(getattr(layer, name)))
        if options.bias:
            out = out + value(getattr(layer, f"{name}_bias"))
        if options.qk_norm != "none" and name != "v":
            axes = (1, 2) if options.qk_norm == "full" else (2,)
            scale = value(getattr(layer, f"{name}_norm").weight)
            scale = scale.reshape(heads, HEAD_DIM) if options.qk_norm == "full" else scale
            out = out / np.sqrt((out**2).mean(axes, keepdims=True) + EPS) * scale
        return np.clip(out, -options.clip_qkv, options.clip_qkv) if options.clip_qkv else out

    def rotated(a):
        half = HEAD_DIM // 2
        angle = positions[:, None] * THETA ** (-np.arange(half) / half)
        turn = np.exp(1j * angle)[:, None]
        z = (a[..., :half] + 1j * a[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    q, k, v = rotated(projected("q", HEADS)), rotated(projected("k", KV_HEADS)), projected("v", KV_HEADS)
    out = np.zeros((len(x), WIDTH))
    for h in range(HEADS):
        keys, values = k[:, h // (HEADS // KV_HEADS)], v[:, h // (HEADS // KV_HEADS)]
        for i, place in enumerate(positions):
            seen = [j for j in range(i + 1) if not options.window or place - positions[j] < options.window]
            scores = keys[seen] @ q[i, h] / np.sqrt(HEAD_DIM)
            weights = np.exp(scores - scores.max())
            out[i] += (weights / weights.sum() @ values[seen]) @ value(layer.o)[h]
    return out + value(layer.o_bias) if options.bias else out


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("gaps", [False, True], ids=["every position", "some positions"])
def test_equals_the_formula(name, gaps):
    options, rng = OPTIONS[name], np.random.default_rng(1)
    layer, x = attention(options), rng.normal(size=(BATCH, SEQ, WIDTH))
    places = [np.sort(rng.choice(2 * SEQ, SEQ, replace=False)) if gaps else np.arange(SEQ) for _ in range(BATCH)]
    index = jnp.asarray(np.stack(places), jnp.int32)
    got, _ = layer(jnp.asarray(x, jnp.float32), Rows(rope_at(index, HEAD_DIM, THETA), index if gaps else None))
    want = [written_out(layer, options, row, at) for row, at in zip(x, places, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


def test_a_layer_without_options_has_the_parameters_of_llama():
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(attention(LLAMA)))} == {"q", "k", "v", "o"}


def test_neither_norms_nor_biases_are_decayed():
    state = nnx.state(attention(OPTIONS["all"]))
    flags = {jax.tree_util.keystr(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(decayed(state))}
    assert len(flags) == 10 and sum(flags.values()) == 4
    assert not any(flag for name, flag in flags.items() if "norm" in name or "bias" in name)
