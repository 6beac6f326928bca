"""A denoiser of two layers of attention in numpy, whole and with keys and values that are kept."""

import numpy as np

VOCAB, MASK, WIDTH, LAYERS, PLACES = 13, 12, 8, 2, 64
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(VOCAB, WIDTH))
POSITION = RNG.normal(size=(PLACES, WIDTH))
Q, K, V, MLP = RNG.normal(size=(4, LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
HEAD = RNG.normal(size=(WIDTH, VOCAB))


def layer(number, x, keys, values, sees):
    """x [k, width] reading keys and values [n, width] where sees bool[k, n]."""
    scores = np.where(sees, x @ Q[number] @ keys.T, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    x = x + weights / weights.sum(-1, keepdims=True) @ values
    return x + np.tanh(x @ MLP[number])


def visible(places, n, block):
    """bool[k, n]: what queries at places see; block 0: everything."""
    if not block:
        return np.ones((len(places), n), bool)
    return np.arange(n)[None] // block <= np.asarray(places)[:, None] // block


def whole(tokens, block=0):
    """Logits f32[rows, n, vocab] of tokens i32[rows, n]."""
    out = []
    for row in np.asarray(tokens):
        x = EMBEDDING[row] + POSITION[: len(row)]
        for number in range(LAYERS):
            x = layer(number, x, x @ K[number], x @ V[number], visible(range(len(row)), len(row), block))
        out.append(x @ HEAD)
    return np.stack(out).astype(np.float32)


class Row:
    """Keys and values of one row of n positions, as they were when each was computed last."""

    def __init__(self, n, block=0):
        self.keys, self.values = np.full((2, LAYERS, n, WIDTH), np.nan)
        self.block = block

    def compute(self, tokens, places, held):
        """Logits [k, vocab] of tokens at places, reading the positions held."""
        x = EMBEDDING[tokens] + POSITION[places]
        held = np.asarray(sorted(held))
        for number in range(LAYERS):
            self.keys[number, places], self.values[number, places] = x @ K[number], x @ V[number]
            sees = visible(places, self.keys.shape[1], self.block)[:, held]
            x = layer(number, x, self.keys[number, held], self.values[number, held], sees)
        return x @ HEAD


class Toy:
    """The same as a decoder's network."""

    def __init__(self, block=0):
        self.block, self.shifted = block, False
        self.sizes = []  # positions of every call

    def empty(self, rows, n):
        return [Row(n, self.block) for _ in range(rows)]

    def put(self, state, row, one):
        return [*state[:row], one[0], *state[row + 1 :]]

    def __call__(self, tokens, places, exists, held, share, *, state):
        tokens, places, exists, held = map(np.asarray, (tokens, places, exists, held))
        self.sizes.append(tokens.shape[1])
        logits = np.zeros((*tokens.shape, VOCAB), np.float32)
        for r, row in enumerate(state):
            if exists[r].any():
                own = exists[r]
                logits[r, own] = row.compute(tokens[r, own], places[r, own], np.flatnonzero(held[r]))
        return logits, state
