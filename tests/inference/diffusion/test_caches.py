"""Caches and policies against one plain loop, row by row, on a toy denoiser."""

import dataclasses

import jax
import numpy as np
import pytest
from diffusion_toys import MASK, Row, Toy
from jax import random as jrandom

from adaptive.inference.diffusion.caches import block as blocks
from adaptive.inference.diffusion.caches import delayed, dual, greedy, none, prefix, window
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.policies import confidence, editing, factor, learned, propagation, random, threshold

pytestmark = pytest.mark.compiles

PROMPTS = [np.random.default_rng(r).integers(0, MASK, 6) for r in (1, 2)]
LENGTH = 16


class Naive:
    """One row, decoded by sets of places. The policy is `pick(row, {place: (token, confidence)}) -> places`, the cache
    `needs(row) -> (computed, held)`."""

    def __init__(self, prompt, block, pick, needs, *, aligned=False, first=()):
        self.x = [*map(int, prompt), *[MASK] * LENGTH]
        self.n, self.p, self.block = len(self.x), len(prompt), block
        self.low = self.p // block * block if aligned else self.p
        self.pick, self.needs, self.written, self.first = pick, needs, {}, list(first)
        self.calls, self.step, self.held, self.computed = 0, 0, set(), 0
        self.cache = Row(self.n, block if aligned else 0)
        self.trace = []
        while MASK in self.x:
            self.high = min(self.low + block, self.n)
            self.due = self.x[self.low : self.high].count(MASK)
            self.step = 0
            while MASK in self.x[self.low : self.high]:
                self.call()
            self.low += block

    def masked(self):
        return {i for i in range(self.n) if self.x[i] == MASK}

    def fresh(self):
        return {i for i, call in self.written.items() if call == self.calls - 1}

    def call(self):
        computed, self.held = self.needs(self)
        places = np.array(sorted(computed))
        logits = self.cache.compute(np.array(self.x)[places], places, self.held)
        logits[:, MASK] = -np.inf
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share = (share / share.sum(-1, keepdims=True)).max(-1)
        seen = {int(i): (int(t), float(c)) for i, t, c in zip(places, logits.argmax(-1), share, strict=True)}
        for i in self.pick(self, seen):
            self.x[i], self.written[i] = seen[i][0], self.calls
        self.calls, self.step, self.computed = self.calls + 1, self.step + 1, self.computed + len(computed)
        self.trace.append(list(self.x))

    def open(self, seen):
        return sorted(i for i in self.masked() if i < self.high and i in seen)

    def sure(self, seen):
        """Open places, the surest first."""
        return sorted(self.open(seen), key=lambda i: -seen[i][1])


def count_of(row, steps):
    return row.due // steps + (row.step < row.due % steps)


def by_schedule(steps):
    return lambda row, seen: row.sure(seen)[: count_of(row, steps)]


def by_threshold(least):
    return lambda row, seen: [i for k, i in enumerate(row.sure(seen)) if k == 0 or seen[i][1] >= least]


def by_noise(noise, steps):
    """noise(call) f32[n]."""
    return lambda row, seen: sorted(row.open(seen), key=lambda i: -noise(row.calls)[i])[: count_of(row, steps)]


def by_factor(size):
    def pick(row, seen):
        sure = row.sure(seen)
        fits = [n for n in range(1, len(sure) + 1) if (n + 1) * (1 - seen[sure[n - 1]][1]) < size]
        return sure[: max([1, *fits])]

    return pick


def by_editing(least, replace, before):
    def pick(row, seen):
        open_from = row.low - before * row.block
        edits = [i for i in row.written if open_from <= i < row.high and i in seen and seen[i][0] != row.x[i]]
        return by_threshold(least)(row, seen) + [i for i in edits if seen[i][1] >= replace]

    return pick


def by_propagation(anchor, near, radius):
    def pick(row, seen):
        sure = row.sure(seen)
        anchors = [i for i in sure if seen[i][1] >= anchor]
        beside = [i for i in sure if seen[i][1] >= near and any(abs(i - a) <= radius for a in anchors)]
        return {*sure[:1], *anchors, *beside}

    return pick


def everything(row):
    return set(range(row.n)), set(range(row.n))


def prefix_of(row):
    return set(range(0 if row.step == 0 else row.low, row.n)), set(range(row.n))


def dual_of(row):
    own = range(row.n) if row.step == 0 else range(row.low, row.high)
    return set(own), set(range(row.n))


def delayed_of(refresh):
    def needs(row):
        every = set(range(row.n))
        return (every if row.calls % refresh == 0 else row.masked() | row.fresh()), every

    return needs


def greedy_of(refresh, reach, noise, steps):
    def needs(row):
        places = sorted((i for i in row.masked() if i < row.high), key=lambda i: -noise(row.calls)[i])
        coming = places[: count_of(row, steps)]
        few = row.fresh() | {i for i in range(row.n) if any(abs(i - c) <= reach for c in coming)}
        return (everything(row)[0] if row.calls % refresh == 0 else few), everything(row)[1]

    return needs


def window_of(outer, inner, refresh):
    def needs(row):
        left = sorted(row.masked())
        anew = row.calls % refresh == 0 or len(row.masked() & row.held) < min(inner, len(left))
        held = set(range(row.n)) - set(left[outer:]) if anew else row.held
        row.active = set([i for i in left if i in held][:inner])
        return (held if anew else row.active | (row.fresh() & held)), held

    return needs


def within_window(pick):
    """The policy among the places of the window alone."""
    return lambda row, seen: pick(row, {i: s for i, s in seen.items() if i in row.active or row.x[i] != MASK})


def block_of(row):
    past = set(range(row.high))
    start = 0 if row.calls == 0 else row.low - row.block if row.step == 0 else row.low
    return {i for i in past if i >= max(start, 0)}, past


def noise_of(key, rows, n):
    """One function call -> f32[n] for each row."""

    def row(r):
        own = jax.random.fold_in(jax.random.fold_in(key, r), 0)
        return lambda call: np.asarray(jax.random.uniform(jax.random.fold_in(own, call), (n,)))

    return [row(r) for r in range(rows)]


KEY = jrandom.key(3)
NOISE = noise_of(KEY, 2, 22)
COUNT = confidence.Settings()
CASES = {
    "none": (COUNT, none.Settings(), by_schedule(4), everything),
    "factor": (factor.Settings(1.0), none.Settings(), by_factor(1.0), everything),
    "editing earlier blocks": (editing.Settings(0.5, 0.6, 1), none.Settings(), by_editing(0.5, 0.6, 1), everything),
    "propagation": (
        propagation.Settings(0.8, 0.4, 2), none.Settings(), by_propagation(0.8, 0.4, 2), everything),
    "prefix, threshold": (threshold.Settings(0.6), prefix.Settings(), by_threshold(0.6), prefix_of),
    "dual": (COUNT, dual.Settings(), by_schedule(4), dual_of),
    "delayed": (COUNT, delayed.Settings(refresh=3), by_schedule(4), delayed_of(3)),
    "window": (
        COUNT, window.Settings(outer=5, inner=2, refresh=4), within_window(by_schedule(4)), window_of(5, 2, 4)),
    "window, threshold": (
        threshold.Settings(0.6), window.Settings(outer=6, inner=3, refresh=4), within_window(by_threshold(0.6)),
        window_of(6, 3, 4)),
}  # fmt: skip


def check(decoder, references):
    found = decoder(PROMPTS, KEY)
    steps = [np.asarray(step.progress.tokens) for step in decoder.steps(PROMPTS, KEY)]
    for r, row in enumerate(references):
        assert found.tokens[r].tolist() == row.x
        assert found.row_calls[r] == row.calls and found.computed[r] == row.computed
        assert found.per_call()[r] == LENGTH / row.calls
        changes = [s[r].tolist() for k, s in enumerate(steps) if k == 0 or (s[r] != steps[k - 1][r]).any()]
        assert changes == [t for k, t in enumerate(row.trace) if k == 0 or t != row.trace[k - 1]]
        assert [row.written.get(i, -1) for i in range(row.n)] == found.written[r].tolist()
    assert found.calls >= max(row.calls for row in references)
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_is_its_plain_loop(case):
    policy, cache, pick, needs = CASES[case]
    network = Toy()
    plan = Plan(MASK, LENGTH, 8, 8, policy=policy)
    found = check(Decoder(network, plan, cache), [Naive(prompt, 8, pick, needs) for prompt in PROMPTS])
    if not isinstance(cache, none.Settings):
        assert found.computed.sum() < found.row_calls.sum() * 22
        assert min(network.sizes) < 22


def test_greedy_computes_what_it_will_write():
    plan = Plan(MASK, LENGTH, 8, 16, policy=random.Settings())
    pairs = [(by_noise(noise, 8), greedy_of(4, 1, noise, 8)) for noise in NOISE]
    references = [Naive(prompt, 16, *pair) for prompt, pair in zip(PROMPTS, pairs, strict=True)]
    found = check(Decoder(Toy(), plan, greedy.Settings(refresh=4, window=1)), references)
    assert (found.computed < found.row_calls * 14).all()


@pytest.mark.parametrize("policy", [COUNT, threshold.Settings(0.6)], ids=["schedule", "threshold"])
def test_the_cache_of_block_diffusion_changes_nothing(policy):
    plan = Plan(MASK, LENGTH, 8, 4, policy=policy)
    pick = by_schedule(2) if policy is COUNT else by_threshold(0.6)
    prompts = [PROMPTS[0], PROMPTS[1][:3]]  # blocks begin within prompts, which are not alike long
    references = [Naive(prompt, 4, pick, everything, aligned=True) for prompt in prompts]
    cached = [Naive(prompt, 4, pick, block_of, aligned=True) for prompt in prompts]
    found = [Decoder(Toy(4), plan, cache)(prompts) for cache in (none.Settings(), blocks.Settings())]
    for r, (row, quick) in enumerate(zip(references, cached, strict=True)):
        assert row.x == quick.x == found[0].tokens[r, : row.n].tolist() == found[1].tokens[r, : row.n].tolist()
        assert row.calls == found[0].row_calls[r] == found[1].row_calls[r]
        assert found[1].computed[r] == quick.computed < row.computed / 2


def test_a_learned_filter_is_its_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    weights = learned.Filter(*(rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), 6, (6, 4), 4)))
    weights.save(tmp_path / "filter.npz")

    def pick(row, seen):
        places = range(row.low, row.high)
        sure = np.array([seen[i][1] if row.x[i] == MASK else 1.0 for i in places])
        inner = np.maximum(sure @ weights.inner + weights.inner_bias, 0)
        final = 1 / (1 + np.exp(-(inner @ weights.outer + weights.outer_bias))) >= 0.6
        return {*row.sure(seen)[:1], *(i for i, yes in zip(places, final, strict=True) if yes and row.x[i] == MASK)}

    plan = Plan(MASK, LENGTH, 8, 4, policy=learned.Settings(str(tmp_path / "filter.npz"), 0.6))
    found = check(Decoder(Toy(), plan, dual.Settings()), [Naive(prompt, 4, pick, dual_of) for prompt in PROMPTS])
    assert (found.row_calls < LENGTH).all()


def test_a_row_ends_at_its_end_token():
    plan = Plan(MASK, LENGTH, 16, 8)
    whole = Decoder(Toy(), plan)(PROMPTS)
    end = int(whole.tokens[0, 6 + 5])
    found = Decoder(Toy(), dataclasses.replace(plan, end=end))(PROMPTS)
    for r in range(2):
        answer = whole.tokens[r, 6:].tolist()
        assert found.lengths[r] == 6 + (answer.index(end) + 1 if end in answer else LENGTH)
        assert (found.tokens[r, : found.lengths[r]] == whole.tokens[r, : found.lengths[r]]).all()
    assert found.row_calls[0] <= 8 < whole.row_calls[0]
