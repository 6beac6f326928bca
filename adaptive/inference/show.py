"""What a user sees of generation: the text on standard output, what it took on standard error."""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from adaptive.account import account, dense_equivalent
from adaptive.inference.marks import Writer, depth_legend, expert_legend, legend, together
from adaptive.inference.sampling import Piece
from adaptive.runs.load import Trained


class Continuation:
    """What one prompt was continued with, so far.

    tokens    ids, without the token that ends a text
    logprobs  of each of them, as in Piece
    depths    passes that each of them took
    experts   the strongest expert of each of them in each layer that has experts; None: none computed it
    ended     "end": the model ended the text; "stop": a stop text did; "length": there are as many tokens as asked for
    """

    def __init__(self, writer: Writer):
        self.writer = writer
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.depths: list[int] = []
        self.experts: list[list[int | None]] = []
        self.ended = "length"

    @property
    def done(self) -> bool:
        return self.ended != "length"

    def add(self, piece: Piece, row: int) -> str:
        """What can be shown after the row's tokens of a piece; nothing after it has ended."""
        there = piece.valid[row]
        depth = np.ones_like(piece.tokens[row]) if piece.depth is None else piece.depth[row]
        layers = np.zeros((0, len(there)), int) if piece.experts is None else piece.experts[:, row]
        expert = _last(layers)
        if piece.prompt:
            shown = piece.tokens[row, there], piece.boundaries[:, row, there], depth[there], expert[there]
            return self.writer.push(*shown, prompt=True)
        assert piece.logprobs is not None
        text = ""
        for i in range(len(there)):
            if self.done:
                break
            if not there[i]:
                self.ended = "end"
                break
            self.tokens.append(int(piece.tokens[row, i]))
            self.logprobs.append(float(piece.logprobs[row, i]))
            self.depths.append(int(depth[i]))
            self.experts.append([int(e) if e >= 0 else None for e in layers[:, i]])
            one = slice(i, i + 1)
            text += self.writer.push(piece.tokens[row, one], piece.boundaries[:, row, one], depth[one], expert[one])
            if self.writer.stopped:
                self.ended = "stop"
        return text


class Show:
    """Prints what comes and tells at the end what it took.

    prompts  that are continued together: one is shown as it is made, several at the end
    begin    when the command began, by `time.perf_counter`
    marks    whether to mark where chunks begin
    depths   whether to show how many passes tokens took
    experts  whether to show their strongest experts
    stops    texts that end a continuation
    as_json  whether to print a line of JSON for each prompt at the end, in place of text
    """

    def __init__(
        self,
        trained: Trained,
        prompts: Sequence[str],
        begin: float,
        *,
        marks: bool,
        depths: bool = False,
        experts: bool = False,
        stops: Sequence[str] = (),
        as_json: bool = False,
    ):
        self._trained, self._prompts, self._begin = trained, prompts, begin
        self._marks, self._json = marks, as_json
        facts = trained.recipe.model.facts()
        self._stages = len(facts.chunking)
        self._passes = facts.recursions if facts.depth != "none" else 1
        self._depths = self._passes if depths else 0
        self._experts = max((one.settings.experts for one in facts.experts), default=0) if experts else 0
        terminal = sys.stdout.isatty() and not as_json
        self._colour = terminal and "NO_COLOR" not in os.environ
        tokenizer, colour = trained.tokenizer, self._colour
        writer = functools.partial(
            Writer, tokenizer, marks=marks, depths=self._depths, experts=experts and not as_json, colour=colour,
            safe=terminal, stops=stops,
        )  # fmt: skip
        self._rows = [Continuation(writer()) for _ in prompts]
        self._texts = [""] * len(prompts)
        self._made: list[tuple[float, int]] = []  # when a piece came, and how many tokens there were then

    def all(self, pieces: Iterator[Piece]) -> bool:
        """Shows all pieces, or those until every text has ended; whether Ctrl-C ended them."""
        interrupted = False
        legends = [legend(self._stages, self._colour)] if self._marks else []
        legends += [depth_legend(self._depths, self._colour)] if self._depths else []
        legends += [expert_legend(self._experts, self._colour)] if self._experts else []
        if legends and not self._json:
            print("\n".join(legends) + "\n", flush=True)
        try:
            for piece in pieces:
                self._add(piece)
                if all(row.done for row in self._rows):
                    break
        except KeyboardInterrupt:
            interrupted = True
        for r, row in enumerate(self._rows):
            self._put(r, row.writer.finish())
        if self._json:
            for r in range(len(self._rows)):
                print(json.dumps(self._record(r, interrupted)), flush=True)
        elif len(self._rows) == 1:
            print(flush=True)
        else:
            print("\n\n".join(f"--- {r + 1} of {len(self._texts)}\n{t}" for r, t in enumerate(self._texts)), flush=True)
        self._report(interrupted)
        return interrupted

    def _add(self, piece: Piece) -> None:
        for r, row in enumerate(self._rows):
            text = row.add(piece, r)
            if not (piece.prompt and self._json):
                self._put(r, text)
        if not piece.prompt:
            self._made.append((time.perf_counter(), sum(len(row.tokens) for row in self._rows)))

    def _put(self, row: int, text: str) -> None:
        if len(self._rows) == 1 and not self._json:
            print(text, end="", flush=True)
        else:
            self._texts[row] += text

    def _record(self, r: int, interrupted: bool) -> dict[str, Any]:
        row = self._rows[r]
        routed: dict[str, Any] = {"depths": row.depths} if self._passes > 1 else {}
        routed |= {"experts": row.experts} if self._experts else {}
        return {
            "recipe": self._trained.recipe.name,
            "step": self._trained.step,
            "prompt": self._prompts[r],
            "text": self._texts[r],
            "tokens": row.tokens,
            "logprobs": [value if math.isfinite(value) else None for value in row.logprobs],
            **routed,
            "ended": "interrupted" if interrupted and not row.done else row.ended,
        }

    def _report(self, interrupted: bool) -> None:
        begin, first = self._made[0] if self._made else (time.perf_counter(), 0)
        end, total = self._made[-1] if self._made else (begin, 0)
        line = f"{total} tokens, the first after {begin - self._begin:.1f} s"
        if total > first and end > begin:
            line += f", then {(total - first) / (end - begin):.0f} per second"
            if len(self._rows) > 1:
                line += f" over {len(self._rows)} rows"
        tell(("interrupted: " if interrupted else "") + line)
        if self._stages:
            self._report_chunks()
        if self._passes > 1 and total:
            self._report_depths()

    def _report_depths(self) -> None:
        taken = np.array([depth for row in self._rows for depth in row.depths if depth])
        if len(taken):
            shares = ", ".join(f"{d} {(taken == d).mean():.0%}" for d in range(1, self._passes + 1))
            tell(f"passes of a token: {shares}; {taken.mean():.2f} on average")

    def _report_chunks(self) -> None:
        total = together([row.writer.tally() for row in self._rows])
        if not total.bytes or not all(total.chunks):
            return
        sizes = ", ".join(f"stage {s} {total.bytes / n:.2f}" for s, n in enumerate(total.chunks))
        model, length = self._trained.recipe.model, total.bytes / len(self._rows)
        taken = [n / len(self._rows) for n in total.chunks]
        cost = account(model, round(length), taken).forward_flops_per_token
        whole = dense_equivalent(model, round(length)).forward_flops_per_token
        tell(f"bytes per chunk: {sizes}; {cost / 1e6:.3g} MFLOP per byte, {cost / whole:.0%} of a chunk at every byte")


def _last(layers: np.ndarray) -> np.ndarray:
    """i32[n]: of experts i32[layers, n] that of the last layer in which one computed the token; -1: in none."""
    if not len(layers):
        return np.full(layers.shape[1], -1)
    last = len(layers) - 1 - (layers[::-1] >= 0).argmax(0)
    return np.take_along_axis(layers, last[None], axis=0)[0]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
