"""Wall time, calls and quality of every policy and cache of diffusion decoding, on a trained model."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from adaptive.data.pipeline import open_data
from adaptive.evaluation.n_gram import NGram
from adaptive.inference.diffusion.any_subset import speculate
from adaptive.inference.diffusion.caches import Cache, delayed, dual, greedy, none, prefix, window
from adaptive.inference.diffusion.caches import block as blocks
from adaptive.inference.diffusion.decoder import Decoder
from adaptive.inference.diffusion.filters import observed
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.network import Model, check_cache
from adaptive.inference.diffusion.policies import (
    Policy,
    confidence,
    editing,
    factor,
    learned,
    propagation,
    random,
    threshold,
)
from adaptive.runs.load import Trained
from adaptive.runs.mask_token import denoising_of

PROMPT, USUAL_BLOCK = 32, 32
COUNTED = 400_000  # tokens of training text that the judge counts


@dataclasses.dataclass(frozen=True)
class Way:
    """A policy with a cache; share: of one call for each token, of policies that go by a schedule."""

    name: str
    policy: Policy = confidence.Settings()
    cache: Cache = none.Settings()
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Written:
    """Of all texts of a way: seconds, calls, tokens that a call wrote in each, the judge's nats for each token and its
    standard error over texts, and the share of runs of four tokens that occur once."""

    name: str
    seconds: float
    calls: int
    per_call: float
    nats: float
    error: float
    distinct: float


def ways(block: int, filter: str, *, cached: bool) -> list[Way]:
    """Plain decoding first; block: of a model of block diffusion, else 0; cached: whether the model can have caches."""
    found = [
        Way("one token a call"),
        Way("half the calls", share=0.5),
        Way("a quarter of the calls", share=0.25),
        Way("places at random", random.Settings()),
        Way("threshold 0.9", threshold.Settings(0.9)),
        Way("threshold 0.6", threshold.Settings(0.6)),
        Way("threshold 0.3", threshold.Settings(0.3)),
        Way("factor 1", factor.Settings()),
        Way("editing 0.3, 0.9", editing.Settings(0.3, 0.9)),
        Way("propagation 0.6, 0.3", propagation.Settings(0.6, 0.3)),
        Way("learned filter", learned.Settings(filter, 0.8)),
    ]
    if not cached:
        return found
    if block:
        both = (Way("one token a call, block cache", cache=blocks.Settings()),)
        return [*found, *both, Way("threshold 0.3, block cache", threshold.Settings(0.3), blocks.Settings())]
    kept = prefix.Settings(), dual.Settings(), delayed.Settings(), window.Settings(64, 32, 16)
    with_caches = [Way(f"one token a call, {each.kind()} cache", cache=each) for each in kept]
    fast = Way("threshold 0.3, dual cache", threshold.Settings(0.3), dual.Settings())
    return [*found, *with_caches, Way("places at random, greedy cache", random.Settings(), greedy.Settings()), fast]


class Bench:
    """Continues held-out texts of a run in several ways.

    texts, length   how many, and tokens to write behind each
    temperature     of all ways
    """

    def __init__(self, trained: Trained, texts: int, length: int, temperature: float, say: Callable[[str], object]):
        recipe = trained.recipe
        self._how, self._say, self._tokenizer = denoising_of(recipe), say, trained.tokenizer
        self._length, self._temperature = length, temperature
        self._block = self._how.block or max(d for d in range(1, USUAL_BLOCK + 1) if length % d == 0)
        data = open_data(recipe.data, batch_size=texts, vocab_size=recipe.model.vocab_size)
        self._networks = {
            cached: Model(trained.graphdef, trained.state, self._how, cached=cached) for cached in (False, True)
        }
        say("counting the training text")
        batches = iter(data.train())
        size = texts * recipe.data.seq_len
        counted = [np.asarray(next(batches).tokens).reshape(-1) for _ in range(-(-COUNTED // size))]
        vocab = recipe.model.vocab_size
        self._judge = NGram(np.concatenate(counted), vocab, next(k for k in (5, 4, 3, 2) if vocab**k < 2**63))
        rows = np.asarray(next(data.validation(texts)).tokens)
        self._prompts = list(rows[:, :PROMPT])
        self.held_out = self._judged(rows[:, : PROMPT + length])
        self.cached = _can(lambda: check_cache(recipe.model, blocks.Settings()))

    @property
    def block(self) -> int:
        return self._how.block

    def decoder(self, way: Way) -> Decoder:
        steps = max(1, round(self._length * way.share))
        mask, vocab = self._how.mask_id, self._tokenizer.vocab_size
        plan = Plan(mask, self._length, steps, self._block, 0.0, self._temperature, way.policy, vocab=vocab)
        return Decoder(self._networks[not isinstance(way.cache, none.Settings)], plan, way.cache)

    def written(self, way: Way) -> Written:
        self._say(way.name)
        decoder, key = self.decoder(way), jax.random.key(0)
        decoder(self._prompts, key)  # compiles
        begin = time.perf_counter()
        found = decoder(self._prompts, key)
        seconds = time.perf_counter() - begin
        rows = found.tokens[:, : PROMPT + self._length]
        return Written(way.name, seconds, found.calls, float(found.per_call().mean()), *self._judged(rows))

    def speculated(self, ahead: int) -> Written:
        """By speculative sampling of any subset; each token drawn given all before it, from left to right."""
        self._say("any-subset speculation")
        network = self._networks[False]
        n = PROMPT + self._length

        def denoise(tokens: np.ndarray) -> Any:
            rows = -(-len(tokens) // len(self._prompts)) * len(self._prompts)  # few shapes
            padded = np.pad(tokens, ((0, rows - len(tokens)), (0, 0)))
            places = np.broadcast_to(np.arange(n, dtype=np.int32), padded.shape)
            there = np.ones(padded.shape, bool)
            share = (padded == self._how.mask_id).mean(1, dtype=np.float32)
            return network(*map(jax.numpy.asarray, (padded, places, there, there, share)), state=None)[0][: len(tokens)]

        start = np.pad(np.stack(self._prompts), ((0, 0), (0, self._length)), constant_values=self._how.mask_id)
        options: dict[str, Any] = {"mask_id": self._how.mask_id, "ahead": ahead, "key": jax.random.key(0)}
        run = lambda: speculate(denoise, start, temperature=self._temperature, **options)  # noqa: E731
        run()
        begin = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - begin
        name = f"any-subset speculation, {ahead} ahead"
        return Written(name, seconds, found.calls, self._length / found.calls, *self._judged(found.tokens))

    def fit_filter(self, path: Path, rounds: int = 2) -> None:
        """A learned filter of plain decodes, into a file."""
        self._say("fitting the filter")
        plain = self.decoder(Way("plain"))
        seen = [observed(plain, self._prompts, jax.random.key(1 + number)) for number in range(rounds)]
        learned.fit(*map(np.concatenate, zip(*seen, strict=True))).save(path)

    def _judged(self, rows: np.ndarray) -> tuple[float, float, float]:
        each = np.array([self._judge.nats(row, PROMPT).mean() for row in rows])
        grams = np.concatenate([np.stack([row[i : len(row) - 3 + i] for i in range(4)], 1) for row in rows[:, PROMPT:]])
        distinct = len(np.unique(grams, axis=0)) / len(grams)
        return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5), distinct


def _can(check: Callable[[], None]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def table(title: str, found: Sequence[Written], held_out: tuple[float, float, float]) -> Table:
    """Everything beside plain decoding, the first; held-out texts in the last line."""
    out = Table("", "calls", "tokens a call", "seconds", "times faster", "judge, nats", "distinct", title=title)
    for each in found:
        faster = f"{found[0].seconds / each.seconds:.2f}"
        judge = f"{each.nats:.3f} ± {each.error:.3f}"
        out.add_row(
            each.name,
            str(each.calls),
            f"{each.per_call:.2f}",
            f"{each.seconds:.2f}",
            faster,
            judge,
            f"{each.distinct:.3f}",
        )
    nats, error, distinct = held_out
    out.add_row("held-out text itself", "", "", "", "", f"{nats:.3f} ± {error:.3f}", f"{distinct:.3f}")
    return out
