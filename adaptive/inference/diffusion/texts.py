"""Texts that a diffusion model writes, as a user asks for them and sees them."""

import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from adaptive.errors import UserError
from adaptive.inference.diffusion.caches import Cache, block, none
from adaptive.inference.diffusion.decoder import Decoded, Decoder, Step
from adaptive.inference.diffusion.loop import Plan
from adaptive.inference.diffusion.named import named
from adaptive.inference.diffusion.network import Model, check_cache, starved
from adaptive.inference.diffusion.policies import Policy, confidence
from adaptive.inference.drawing import Drawing
from adaptive.inference.marks import Writer, shade
from adaptive.inference.show import tell
from adaptive.recipe import Recipe
from adaptive.runs.load import Trained
from adaptive.runs.mask_token import denoising_of
from adaptive.settings import divisors

USUAL_BLOCK = 32  # positions of a block at most, where neither user nor model says how many
PAYS_FROM = 2  # blocks of a row from which on the exact cache is the faster (docs/diffusion.md)
_PLAIN = "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Asked:
    """How texts are to be written; what is None or empty is chosen.

    tokens       behind each prompt
    steps        calls for all of them, of policies that go by a schedule; None: one for each token
    block        positions of a block; None: as the model was trained, or the largest divisor of tokens up to 32
    policy       name of what is written at each call, with values: threshold(0.8)
    cache        name of what is kept between calls; empty: none, of a model of block diffusion the exact one
    guidance     0: none
    temperature  0: the likeliest tokens
    end          token that ends a text; None: none does
    """

    tokens: int
    steps: int | None = None
    block: int | None = None
    policy: str = ""
    cache: str = ""
    guidance: float = 0.0
    temperature: float = 0.0
    end: int | None = None


def decoder_of(asked: Asked, trained: Trained) -> Decoder:
    """What writes as asked with a model. Raises UserError for what cannot work."""
    recipe, how = trained.recipe, denoising_of(trained.recipe)
    cache: Cache = named(Cache, asked.cache, "--cache") if asked.cache else usual_cache(recipe, asked.tokens)
    policy: Policy = named(Policy, asked.policy, "--policy") if asked.policy else confidence.Settings()
    check_cache(recipe.model, cache)
    size = asked.block or how.block or max(d for d in divisors(asked.tokens) if d <= USUAL_BLOCK)
    steps = asked.tokens if asked.steps is None else asked.steps
    plan = Plan(how.mask_id, asked.tokens, steps, size, asked.guidance, asked.temperature, policy)
    plan = dataclasses.replace(plan, end=asked.end, vocab=trained.tokenizer.vocab_size)
    if asked.steps is not None and not policy.scheduled:
        raise UserError(f"--steps {asked.steps}: policy {policy.kind()} decides itself how many calls a text takes")
    return Decoder(
        Model(trained.graphdef, trained.state, how, cached=not isinstance(cache, none.Settings)), plan, cache
    )


def written(trained: Trained, prompt: np.ndarray, tokens: int, key: jax.Array) -> np.ndarray:
    """i32[n] behind a prompt i32[p], about `tokens` of them: whole blocks, by a call for every fourth token."""
    size = denoising_of(trained.recipe).block or min(USUAL_BLOCK, tokens)
    blocks = max(1, tokens // size)
    asked = Asked(blocks * size, steps=blocks * -(-size // 4), block=size, temperature=Drawing().temperature)
    asked = dataclasses.replace(asked, end=trained.tokenizer.eos_id)
    found = decoder_of(asked, trained)([prompt], key)
    return found.tokens[0, len(prompt) : found.lengths[0]]


def usual_cache(recipe: Recipe, tokens: int) -> Cache:
    """The cache for rows of so many tokens where none is asked for: the faster of those that change no text."""
    size = denoising_of(recipe).block
    try:
        check_cache(recipe.model, block.Settings())
    except UserError:
        return none.Settings()
    return block.Settings() if 0 < PAYS_FROM * size <= tokens else none.Settings()


def remarks(decoder: Decoder, trained: Trained, longest: int) -> Iterator[str]:
    """What a user should know before texts of up to so many tokens are written."""
    recipe, kind = trained.recipe, decoder.cache.kind()
    if 0 < recipe.model.positions < longest:
        most = recipe.model.positions
        raise UserError(f"the model reads at most {most} tokens, and prompt and text are {longest}: fewer --tokens")
    if longest > recipe.data.seq_len:
        yield f"note: up to {longest} tokens, but it was trained on sequences of {recipe.data.seq_len}"
    if not decoder.cache.exact:
        yield f"note: with cache {kind} the text is not what the model computes without one"
    if kind != "none" and (few := starved(recipe.model, decoder.plan.block)):
        yield f"note: with cache {kind} {few}"


class Shown:
    """Prints texts that are written together: one block after another of a single one, several at the end.

    steps    whether to show which call wrote each token
    stops    texts that end one
    as_json  whether to print a line of JSON for each
    """

    def __init__(
        self,
        trained: Trained,
        prompts: Sequence[str],
        begin: float,
        *,
        steps: bool,
        stops: Sequence[str],
        as_json: bool,
    ):
        self._trained, self._prompts, self._begin = trained, prompts, begin
        self._steps, self._json = steps, as_json
        terminal = sys.stdout.isatty() and not as_json
        self._colour = terminal and "NO_COLOR" not in os.environ
        self._writer = functools.partial(
            Writer, trained.tokenizer, colour=self._colour and steps, safe=terminal, stops=stops
        )

    def all(self, decoder: Decoder, ids: Sequence[np.ndarray], key: jax.Array) -> bool:
        """Writes and shows what follows the prompts i32[n]; whether Ctrl-C ended it."""
        alone = len(ids) == 1 and not (self._json or self._steps or decoder.plan.policy.replaces)
        shown = _Growing(self._writer(), ids[0], decoder.plan) if alone else None
        last, calls, computed, interrupted = None, 0, np.zeros(len(ids), np.int64), False
        try:
            for step in decoder.steps(ids, key):
                last, calls, computed = step, calls + 1, computed + step.computed
                if shown is not None and shown.add(step):
                    break
        except KeyboardInterrupt:
            interrupted = True
        if last is None:
            raise KeyboardInterrupt
        found = decoder.result(ids, last.progress, calls, computed)
        rows = [self._row(found, r, len(own), decoder.plan) for r, own in enumerate(ids)]
        if shown is not None:
            shown.finish()
        elif not self._json:
            self._print(found, rows)
        else:
            for r, row in enumerate(rows):
                print(json.dumps(self._record(found, r, row, interrupted)), flush=True)
        self._report(decoder, found, [len(row.tokens) for row in rows], interrupted)
        return interrupted

    def _row(self, found: Decoded, r: int, given: int, plan: Plan) -> "_Row":
        """The text of a row, up to its end, to a stop text, or to what was not written any more."""
        tokens = found.tokens[r, : found.lengths[r]]
        unfinished = np.flatnonzero(tokens[given:] == plan.mask)
        end = given + int(unfinished[0]) if len(unfinished) else len(tokens)
        ended = "length"
        if plan.end is not None and end > given and tokens[end - 1] == plan.end:
            end, ended = end - 1, "end"
        most = int(found.row_calls.max()) if self._steps else 0
        writer = self._writer(depths=most)
        nowhere = np.zeros((0, 1), bool)
        text = writer.push(tokens[:given], np.zeros((0, given), bool), prompt=True) if not self._json else ""
        kept = []
        for i in range(given, end):
            text += writer.push(tokens[i : i + 1], nowhere, found.written[r, i : i + 1] + 1)
            kept.append(i)
            if writer.stopped:
                ended = "stop"
                break
        return _Row(text + writer.finish(), kept, ended)

    def _print(self, found: Decoded, rows: "Sequence[_Row]") -> None:
        if self._steps:
            print(steps_legend(int(found.row_calls.max()), self._colour) + "\n", flush=True)
        if len(rows) == 1:
            print(rows[0].text, flush=True)
        else:
            print("\n\n".join(f"--- {r + 1} of {len(rows)}\n{row.text}" for r, row in enumerate(rows)), flush=True)

    def _record(self, found: Decoded, r: int, row: "_Row", interrupted: bool) -> dict[str, Any]:
        chance = [float(found.chance[r, i]) for i in row.tokens]
        return {
            "recipe": self._trained.recipe.name,
            "step": self._trained.step,
            "prompt": self._prompts[r],
            "text": row.text,
            "tokens": [int(found.tokens[r, i]) for i in row.tokens],
            "logprobs": [math.log(value) if value > 0 else None for value in chance],
            "calls": [int(found.written[r, i]) for i in row.tokens],
            "ended": "interrupted" if interrupted and row.ended == "length" else row.ended,
        }

    def _report(self, decoder: Decoder, found: Decoded, made: Sequence[int], interrupted: bool) -> None:
        total, seconds = sum(made), time.perf_counter() - self._begin
        per_call = float(np.mean(found.per_call()))
        everything = found.row_calls.sum() * found.tokens.shape[1]
        line = f"{total} tokens in {found.calls} calls, {per_call:.2f} a call in each text, {seconds:.1f} s"
        if decoder.cache.kind() != "none":
            share = found.computed.sum() / max(everything, 1)
            line += f"; cache {decoder.cache.kind()}: {share:.0%} of positions computed"
        tell(("interrupted: " if interrupted else "") + line)


@dataclasses.dataclass(frozen=True)
class _Row:
    """text, the places of its tokens, and what ended it."""

    text: str
    tokens: list[int]
    ended: str


class _Growing:
    """A text that is printed as far as it is written without gaps."""

    def __init__(self, writer: Writer, prompt: np.ndarray, plan: Plan):
        self._writer, self._plan, self._at = writer, plan, len(prompt)
        self._put(writer.push(prompt, np.zeros((0, len(prompt)), bool), prompt=True))

    def add(self, step: Step) -> bool:
        """Prints what is new after a step; whether nothing more will be printed."""
        tokens = np.asarray(step.progress.tokens[0])
        while self._at < len(tokens) and tokens[self._at] != self._plan.mask:
            if tokens[self._at] == self._plan.end:
                return True
            self._put(self._writer.push(tokens[self._at : self._at + 1], np.zeros((0, 1), bool)))
            if self._writer.stopped:
                return True
            self._at += 1
        return False

    def finish(self) -> None:
        self._put(self._writer.finish() + "\n")

    def _put(self, text: str) -> None:
        print(text, end="", flush=True)


def steps_legend(most: int, colour: bool) -> str:
    """What marks of steps mean, of so many calls."""
    some = sorted({round(1 + (most - 1) * part / 4) for part in range(5)})
    if not colour:
        return (
            f"which call wrote each token, where another begins: {shade(1, most, False)} to {shade(most, most, False)}"
        )
    names = ", ".join(f"{shade(each, most, True)}{each}{_PLAIN}" for each in some)
    return f"which call wrote each token: {names}"
