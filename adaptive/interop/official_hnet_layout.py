"""The `arch_layout` grammar of the H-Net release: which blocks each stage of the network is made of.

layout := [ blocks , layout , blocks ]     a stage: encoder, inner network, decoder
        | [ blocks ]                       the innermost network
blocks := ( letter count )+                "m4", "T22", "T1m4"

letter   mixer      feed-forward
m        Mamba-2    none
M        Mamba-2    SwiGLU
t        attention  none
T        attention  SwiGLU
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from adaptive.errors import RecipeError
from adaptive.layers import stack
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.mixers.mamba2 import Settings as Mamba2

LETTERS = "mMtT"


class Run(NamedTuple):
    """`count` equal blocks in a row."""

    letter: str
    count: int  # type: ignore[assignment]  # hides tuple.count


Runs = tuple[Run, ...]


class Layout(NamedTuple):
    """encoders, decoders: of every chunking stage, from the bytes inwards; main: the innermost network."""

    encoders: tuple[Runs, ...]
    main: Runs
    decoders: tuple[Runs, ...]

    @property
    def stages(self) -> int:
        """How many stages chunk."""
        return len(self.encoders)

    def letters(self, stage: int) -> str:
        """The letters of one stage, the innermost network last."""
        stacks = (self.main,) if stage == self.stages else (self.encoders[stage], self.decoders[stage])
        return "".join(run.letter for runs in stacks for run in runs)


class Parts(NamedTuple):
    """What the blocks of one stage are made of; None where it has nothing of the kind."""

    attention: Attention | None
    mamba: Mamba2 | None
    feed_forward: Dense | None


def block_of(letter: str, parts: Parts) -> Block:
    """The block that a letter stands for."""
    mixer = parts.attention if letter in "tT" else parts.mamba
    return Block(mixer, parts.feed_forward if letter.isupper() else None)


def stack_of(runs: Runs, parts: Parts) -> stack.Settings:
    """The stack of these blocks; stream in float32, initial matrices that shrink with depth, as in the release."""
    first, *others = [(block_of(run.letter, parts), run.count) for run in runs]
    if not others:
        return stack.Settings((first[0],), first[1], stream="float32", scale_residual=True)
    blocks = tuple(dataclasses.replace(block, repeat=count) for block, count in (first, *others))
    return stack.Settings(blocks, stream="float32", scale_residual=True)


def letter_of(block: Block) -> str:
    """The letter for a block of attention or Mamba-2."""
    letter = "t" if isinstance(block.mixer, Attention) else "m"
    return letter if block.feed_forward is None else letter.upper()


def text_of(settings: stack.Settings) -> str:
    """The blocks of a stack as the grammar spells them."""
    pattern = [letter for block in settings.blocks for letter in letter_of(block) * block.repeat]
    return "".join(f"{letter}{len(list(run))}" for letter, run in itertools.groupby(pattern * settings.repeats))


def parts_in(stacks: Iterable[stack.Settings]) -> Parts:
    """What the blocks of these stacks are made of: the first of each kind."""
    blocks = [block for settings in stacks for block in settings.blocks]
    mixers, feed_forwards = [block.mixer for block in blocks], [block.feed_forward for block in blocks]
    return Parts(
        next((m for m in mixers if isinstance(m, Attention)), None),
        next((m for m in mixers if isinstance(m, Mamba2)), None),
        next((f for f in feed_forwards if isinstance(f, Dense)), None),
    )


def parse_layout(layout: str | list[Any], *, where: str = "arch_layout") -> Layout:
    """The layout that a nested list, or its JSON text, spells.

    Raises RecipeError naming the position, as in [1][0], for anything that is not of the grammar.
    """
    if isinstance(layout, str):
        try:
            layout = json.loads(layout)
        except json.JSONDecodeError as error:
            raise RecipeError(
                f"{where}={layout!r}: not a list (character {error.pos + 1}: {error.msg}); "
                """write it as in ["m4", ["T22"], "m4"]"""
            ) from None
        except RecursionError:
            raise RecipeError(f"{where} is nested too deeply") from None
    encoders: list[Runs] = []
    decoders: list[Runs] = []
    at = ""
    while True:
        if not isinstance(layout, list) or len(layout) not in (1, 3):
            what = f"a list of {len(layout)}" if isinstance(layout, list) else repr(layout)
            raise RecipeError(
                f"{where} at {at or 'the top'}: {what}; a stage is [encoder, inner, decoder], the innermost [blocks]"
            )
        if len(layout) == 1:
            return Layout(tuple(encoders), _runs(layout[0], f"{where} at {at}[0]"), tuple(decoders))
        encoders.append(_runs(layout[0], f"{where} at {at}[0]"))
        decoders.append(_runs(layout[2], f"{where} at {at}[2]"))
        layout, at = layout[1], f"{at}[1]"


def _runs(text: Any, where: str) -> Runs:
    if not isinstance(text, str):
        raise RecipeError(f"{where}: {json.dumps(text)} is no text of blocks, as in m4 or T1m4")
    runs, at = [], 0
    while at < len(text):
        found = re.compile(r"([A-Za-z])(\d{1,4})(?!\d)").match(text, at)
        if found is None or found[1] not in LETTERS or int(found[2]) == 0:
            rest = text[at:]
            why = "a letter and a count from 1 to 9999, as in m4" if found is None or found[1] in LETTERS else (
                f"{found[1]!r} is no block; there are m (Mamba-2), M (with feed-forward), t (attention), T (with it)"
            )  # fmt: skip
            raise RecipeError(f"{where}, character {at + 1} of {text!r}: cannot read {rest!r}: {why}")
        runs.append(Run(found[1], int(found[2])))
        at = found.end()
    if not runs:
        raise RecipeError(f"{where}: no blocks; write as in m4")
    return tuple(runs)
