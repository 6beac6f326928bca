"""Attention with its options against the same written out in numpy, head by head; and what it says it read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from flax import nnx
from hnet_models import forward, random_bytes

from adaptive.layers.call import Call
from adaptive.layers.mixers.attention import Settings, attended
from adaptive.layers.site import Site
from adaptive.layers.where import Where

pytestmark = pytest.mark.compiles

WIDTH, EPS = 12, 1e-3
LLAMA = Settings(heads=4, kv_heads=2, head_dim=6, rope_theta=100.0)
BATCH, SEQ = 2, 7


def settings(**changes):
    return dataclasses.replace(LLAMA, **changes)


OPTIONS = {
    "llama": LLAMA,
    "bias": settings(bias="all"),
    "head norm": settings(qk_norm="head", bias="all"),
    "full norm, clipped": settings(qk_norm="full", clip_qkv=0.9),
    "clipped": settings(clip_qkv=0.5, bias="all"),
    "window": settings(window=3),
    "window of one": settings(window=1),
    "window past the start": settings(window=SEQ + 2),
    "as many keys as queries": settings(kv_heads=0, rotary_dim=4),
    "unrotated": settings(rotary_dim=0, bias="qkv"),
    "scaled, capped": settings(scale=0.3, soft_cap=1.5),
    "all": settings(bias="all", qk_norm="head", clip_qkv=1.1, window=4),
}


def attention(options, seed=0):
    """A layer whose parameters, scales and biases included, are all random."""
    layer = options.build(Site(WIDTH, 0.5, norm_eps=EPS), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), jnp.float32), state))


def written_out(layer, options, x, positions, sees="past"):
    """float64 [n, width] -> [n, width] for one sequence at ascending `positions`."""
    heads, kv_heads, dim = options.heads, options.groups, options.head_dim
    value = lambda p: np.asarray(p[...], np.float64)  # noqa: E731

    def projected(name, heads):
        out = np.einsum("nd,dhe->nhe", x, value(getattr(layer, name)))
        if options.bias != "none":
            out = out + value(getattr(layer, f"{name}_bias"))
        if options.qk_norm != "none" and name != "v":
            axes = (1, 2) if options.qk_norm == "full" else (2,)
            scale = value(getattr(layer, f"{name}_norm").weight)
            scale = scale.reshape(heads, dim) if options.qk_norm == "full" else scale
            out = out / np.sqrt((out**2).mean(axes, keepdims=True) + EPS) * scale
        return np.clip(out, -options.clip_qkv, options.clip_qkv) if options.clip_qkv else out

    def rotated(a):
        half = options.rotated // 2
        angle = positions[:, None] * options.rope_theta ** (-np.arange(half) / max(half, 1))
        turn = np.exp(1j * angle)[:, None]
        z = (a[..., :half] + 1j * a[..., half : 2 * half]) * turn
        return np.concatenate([z.real, z.imag, a[..., 2 * half :]], -1)

    q, k, v = rotated(projected("q", heads)), rotated(projected("k", kv_heads)), projected("v", kv_heads)
    out = np.zeros((len(x), WIDTH))
    for h in range(heads):
        keys, values = k[:, h // (heads // kv_heads)], v[:, h // (heads // kv_heads)]
        for i, place in enumerate(positions):
            ahead = len(x) if sees == "all" else i + 1
            seen = [j for j in range(ahead) if not options.window or abs(place - positions[j]) < options.window]
            scores = keys[seen] @ q[i, h] * (options.scale or dim**-0.5)
            if options.soft_cap:
                scores = options.soft_cap * np.tanh(scores / options.soft_cap)
            weights = np.exp(scores - scores.max())
            out[i] += (weights / weights.sum() @ values[seen]) @ value(layer.o)[h]
    return out + value(layer.o_bias) if options.bias == "all" else out


def applied(layer, x, where, **call):
    return jax.jit(lambda layer, x, where: layer(x, where, Call(**call), None))(layer, x, where)


@pytest.mark.parametrize(("name", "sees"), [*((n, "past") for n in OPTIONS), ("llama", "all"), ("all", "all")])
@pytest.mark.parametrize("gaps", [False, True], ids=["every position", "some positions"])
def test_equals_the_formula(name, gaps, sees):
    options, rng = OPTIONS[name], np.random.default_rng(1)
    layer, x = attention(options), rng.normal(size=(BATCH, SEQ, WIDTH))
    places = [np.sort(rng.choice(2 * SEQ, SEQ, replace=False)) if gaps else np.arange(SEQ) for _ in range(BATCH)]
    index = jnp.asarray(np.stack(places), jnp.int32)
    got, state, _ = applied(layer, jnp.asarray(x, jnp.float32), Where(index, index), sees=sees)
    want = [written_out(layer, options, row, at, sees) for row, at in zip(x, places, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)
    assert state is None


def test_a_layer_without_options_has_the_parameters_of_llama():
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(attention(LLAMA)))} == {"q", "k", "v", "o"}


# What was read


def counted(index, segments, exists, window, sees) -> tuple[int, int]:
    """Queries and the keys that they read, one after another."""
    queries = keys = 0
    for row in range(index.shape[0]):
        for i in np.flatnonzero(exists[row]):
            queries += 1
            for j in np.flatnonzero(exists[row]):
                near = not window or abs(int(index[row, i]) - int(index[row, j])) < window
                keys += near and (sees == "all" or j <= i) and segments[row, i] == segments[row, j]
    return queries, keys


@pytest.mark.parametrize("sees", ["past", "all"])
@pytest.mark.parametrize("window", [0, 1, 4, 50])
def test_keys_that_were_read_are_counted(window, sees):
    """Of whole rows, of documents with padding behind them, of some positions, and of holes among them."""
    rng, n = np.random.default_rng(2), 12
    plain = np.broadcast_to(np.arange(n, dtype=np.int32), (3, n))
    documents = np.repeat([[1, 2, 3, 0]], [3, 5, 1, 3], axis=1).repeat(3, 0).astype(np.int32)
    gaps = np.sort(np.stack([rng.choice(3 * n, n, replace=False) for _ in range(3)]), axis=1).astype(np.int32)
    holes = rng.random((3, n)) < 0.6
    whole, one = np.ones((3, n), bool), np.ones((3, n), np.int32)
    for index, segments, exists in [
        (plain, None, None), (plain, documents, None), (gaps, None, None), (gaps, None, holes),
        (gaps, documents, holes & (documents > 0)),
    ]:  # fmt: skip
        where = Where(jnp.asarray(index), jnp.asarray(index), segments, exists, scattered=exists is not None)
        got = attended(where, window, sees)
        present = exists if exists is not None else whole if segments is None else segments > 0
        want = counted(index, one if segments is None else segments, present, window, sees)
        assert (float(got["queries"]), float(got["keys"])) == want


@pytest.mark.parametrize(("window", "keys_values"), [(0, "per_recursion"), (5, "per_recursion"), (5, "shared")])
def test_a_model_tells_what_its_attention_read(window, keys_values):
    """A Mixture-of-Recursions: each pass among the positions that it selected, or among all."""
    model = shapes.mor(window=window, keys_values=keys_values)
    tokens = random_bytes(batch=2, seq=16) % 40
    trace = forward(model)(tokens).trace
    for r, selection in enumerate(trace.selections):
        index, valid = np.asarray(selection.indices), np.asarray(selection.valid)
        want = counted(index, np.ones_like(index), valid, window, "past")
        if keys_values == "shared":
            want = valid.sum(), np.minimum(index + 1, window)[valid].sum()
        stats = trace.told["core/blocks/0/mixer"].stats
        assert (float(stats["queries"][r, 0]), float(stats["keys"][r, 0])) == want
    assert float(trace.told["prelude/blocks/0/mixer"].stats["queries"][0]) == tokens.size
