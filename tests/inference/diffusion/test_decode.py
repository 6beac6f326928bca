"""Decoding against a plain loop in numpy, as the released code of LLaDA and Fast-dLLM does it."""

import jax
import numpy as np
import pytest

from adaptive.errors import UserError
from adaptive.inference.diffusion import decode

pytestmark = pytest.mark.compiles

VOCAB, MASK = 23, 22
TABLE = np.random.default_rng(0).normal(size=(6, VOCAB, VOCAB)).astype(np.float32)


def denoise(tokens):
    """Logits from a token and its neighbours at two distances either side; rows apart, arithmetic of float32 alone."""
    tokens = np.asarray(tokens)
    place = np.random.default_rng(1).normal(size=(tokens.shape[1], VOCAB)).astype(np.float32)
    out = place + TABLE[0][tokens]
    for table, far in zip(TABLE[1:], (1, -1, 2, -3), strict=False):
        out = out + table[np.roll(tokens, far, axis=1)]
    return (1.5 * out).astype(np.float32)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def transfer_counts(masked, steps):
    """Positions to write at each call i32[rows, steps], the first calls one more."""
    total = masked.sum(1)
    counts = np.tile((total // steps)[:, None], (1, steps))
    for row, rest in enumerate(total % steps):
        counts[row, :rest] += 1
    return counts


def naive(prompt, length, steps, block, guidance=0.0, threshold=None, noise=None, order=None):
    """(ids, ids after each call). noise(call) f64[rows, n, vocab] is the Gumbel noise; order(call) f32[rows, n] stands
    in for confidence."""
    x = np.concatenate([prompt, np.full((len(prompt), length), MASK)], 1)
    given, p, trace = x != MASK, prompt.shape[1], []
    steps //= length // block
    for low in range(p, p + length, block):
        high, i = low + block, 0
        counts = transfer_counts(x[:, low:high] == MASK, steps)
        while i < steps if threshold is None else (x[:, low:high] == MASK).any():
            logits = denoise(x)
            if guidance:
                blind = denoise(np.where(given, MASK, x))
                logits = blind + np.float32(guidance + 1) * (logits - blind)
            logits[..., MASK] = -np.inf
            x0 = (logits if noise is None else logits.astype(np.float64) + noise(len(trace))).argmax(-1)
            chance = np.take_along_axis(softmax(logits), x0[..., None], -1)[..., 0]
            chance = chance if order is None else order(len(trace))
            chance = np.where((x == MASK) & (np.arange(x.shape[1]) < high), chance, -np.inf)
            for row in range(len(x)):
                sure = np.argsort(-chance[row], kind="stable")
                if threshold is None:
                    sure = sure[: counts[row, i]]
                else:
                    sure = [at for k, at in enumerate(sure) if chance[row, at] >= (0 if k == 0 else threshold)]
                x[row, sure] = x0[row, sure]
            trace.append(x.copy())
            i += 1
    return x, np.stack(trace)


PROMPT = np.random.default_rng(2).integers(0, MASK, (3, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 16, "block": 16},
        {"steps": 6, "block": 16},
        {"steps": 8, "block": 4},
        {"steps": 12, "block": 8, "guidance": 1.5},
        {"steps": 16, "block": 8, "threshold": 0.6},
        {"steps": 16, "block": 16, "threshold": 0.6, "guidance": 0.7},
    ],
)
def test_ids_at_every_call_are_those_of_the_plain_loop(options):
    tokens, calls, ids = decode(denoise, PROMPT, 16, mask_id=MASK, trace=True, **options)
    expected, trace = naive(PROMPT, 16, **options)
    assert (np.asarray(tokens) == expected).all()
    assert calls == len(trace) and (ids == trace).all()
    if "threshold" in options:
        assert 16 // options["block"] < calls < 16
    else:
        assert calls == options["steps"]
    again = decode(denoise, PROMPT, 16, mask_id=MASK, **options)
    assert len(again) == 2 and (again[0] == tokens).all()


def uniform(key, rows, which, dtype, length, places=None):
    """call -> draws [rows, length], or [rows, places, length], of each row's own key: which 0 for a policy, 1 for
    tokens."""

    def at(call):
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, r), which), call) for r in range(rows)]
        with jax.enable_x64(True):
            if places is None:
                return np.stack([jax.random.uniform(k, (length,), dtype) for k in keys])
            each = [[jax.random.fold_in(k, place) for place in range(places)] for k in keys]
            return np.stack([[jax.random.uniform(k, (length,), dtype) for k in row] for row in each])

    return at


def test_places_at_random():
    key = jax.random.key(5)
    tokens, calls, ids = decode(
        denoise, PROMPT, 8, mask_id=MASK, steps=4, block=4, policy="random", key=key, trace=True
    )
    expected, trace = naive(PROMPT, 8, 4, 4, order=uniform(key, 3, 0, np.float32, 13))
    assert (ids == trace).all() and (tokens == expected).all() and calls == 4


def test_tokens_drawn_in_double_precision():
    key = jax.random.key(6)
    draws = uniform(key, 3, 1, np.float64, VOCAB, 13)
    options = {"mask_id": MASK, "steps": 4, "block": 8}
    _, _, ids = decode(denoise, PROMPT, 8, **options, key=key, temperature=1.5, trace=True)
    _, trace = naive(PROMPT, 8, 4, 8, noise=lambda call: -1.5 * np.log(-np.log(draws(call))))
    assert (ids == trace).all()
    assert (ids[-1] != naive(PROMPT, 8, 4, 8)[0]).any()


def test_a_row_is_the_same_alone():
    options = {"mask_id": MASK, "steps": 16, "block": 8, "threshold": 0.6, "temperature": 0.5}
    key = jax.random.key(7)
    together, calls = decode(denoise, PROMPT, 16, **options, key=key)
    alone = [decode(denoise, PROMPT[r : r + 1], 16, **options, key=jax.random.fold_in(key, r)[None]) for r in range(3)]
    assert (np.concatenate([tokens for tokens, _ in alone]) == together).all()
    assert max(each for _, each in alone) <= calls <= 16


def test_masks_in_the_prompt_are_written_by_the_plain_loops_rule():
    prompt = PROMPT.copy()
    prompt[:, 2] = MASK
    _, _, ids = decode(denoise, prompt, 8, mask_id=MASK, steps=4, block=4, guidance=1.0, trace=True)
    assert (ids == naive(prompt, 8, 4, 4, guidance=1.0)[1]).all()


def test_it_ends_whatever_a_denoiser_says():
    nothing = lambda tokens: np.full((*tokens.shape, VOCAB), np.nan, np.float32)  # noqa: E731
    tokens, calls = decode(nothing, PROMPT, 16, mask_id=MASK, steps=16, block=8, threshold=0.6)
    assert calls == 16 and tokens.shape == (3, 21)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 3}, ["block=3", "length 8", "1, 2, 4, 8"]),
        ({"steps": 16}, ["steps=16", "8 positions"]),
        ({"steps": 5, "block": 4}, ["steps=5", "2 blocks", "4 or 6"]),
        ({"steps": 1, "block": 4}, ["steps=1", "2 would be"]),
        ({"mask_id": -1}, ["mask has no token"]),
        ({"mask_id": None}, ["mask has no token"]),
        ({"policy": "random"}, ["random", "key"]),
        ({"temperature": 1.0}, ["temperature=1.0", "key"]),
        ({"policy": "confident"}, ["confidence"]),
        ({"policy": "random", "threshold": 0.5}, ["threshold=0.5", "random"]),
        ({"threshold": -0.5}, ["threshold=-0.5"]),
        ({"guidance": -1.0}, ["guidance=-1.0"]),
        ({"length": 0}, ["length=0"]),
        ({"prompt": PROMPT[0]}, ["prompt", "(5,)"]),
    ],
)
def test_numbers_that_cannot_work(options, words):
    given = {"prompt": PROMPT, "length": 8, "mask_id": MASK, "steps": 8, "block": 8, **options}
    with pytest.raises(UserError) as caught:
        decode(denoise, **given)
    assert all(word in str(caught.value) for word in words), caught.value
