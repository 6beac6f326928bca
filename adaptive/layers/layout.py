"""The `arch_layout` grammar of the H-Net release: which blocks each stage of the network is made of.

    layout := [ blocks , layout , blocks ]     a stage: encoder, inner network, decoder
            | [ blocks ]                       the innermost network
    blocks := ( letter count )+                "m4", "T22", "T1m4"

    letter   mixer      feed-forward
    m        Mamba-2    none
    M        Mamba-2    SwiGLU
    t        attention  none
    T        attention  SwiGLU

Beyond the release, the innermost network may be `["model"]`: whatever the rest of the recipe's model describes.
"""

import json
import re
from typing import Any, Literal, NamedTuple

from adaptive.errors import RecipeError

ChunkerKind = Literal["dynamic", "similarity", "stride", "space", "words", "none"]  # what decides where chunks begin
LETTERS = "mMtT"
SWIGLU_MULTIPLE = 128  # released code, modules/mlp.py
HOUSE = "model"  # the innermost network that the other settings of the model describe


class BlockShape(NamedTuple):
    """Sizes of the blocks of one stage.

    intermediate  hidden size of SwiGLU, rounded up to a multiple of 128 as the release does (`feed_forward`)
    rotary_dim    channels of each attention head that rotate with the position
    window        positions to the left that attention sees; -1: all
    ssm_block     positions of a block of Mamba-2's parallel form, at most
    """

    width: int
    intermediate: int
    heads: int
    rotary_dim: int
    window: int
    expand: int
    d_state: int
    d_conv: int
    ssm_head_dim: int
    ssm_block: int

    @property
    def feed_forward(self) -> int:
        return -(-self.intermediate // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE

    @property
    def head_dim(self) -> int:
        """Of attention."""
        return self.width // self.heads


class Run(NamedTuple):
    """`count` equal blocks in a row."""

    letter: str
    count: int  # type: ignore[assignment]  # hides tuple.count

    @property
    def attends(self) -> bool:
        return self.letter in "tT"

    @property
    def has_feed_forward(self) -> bool:
        return self.letter.isupper()

    @property
    def height(self) -> int:
        """Additions to the residual stream."""
        return self.count * (1 + self.has_feed_forward)


Blocks = tuple[Run, ...]


class Layout(NamedTuple):
    """encoders, decoders: of every chunking stage, from the bytes inwards; main: the innermost, () for HOUSE."""

    encoders: tuple[Blocks, ...]
    main: Blocks
    decoders: tuple[Blocks, ...]

    @property
    def stages(self) -> int:
        """How many stages chunk."""
        return len(self.encoders)

    @property
    def house(self) -> bool:
        """Whether the innermost network is the model that the rest of the recipe describes."""
        return not self.main

    def at(self, stage: int) -> tuple[Blocks, ...]:
        """The stacks of blocks of one stage: encoder and decoder, or the main network."""
        return (self.main,) if stage == self.stages else (self.encoders[stage], self.decoders[stage])


def height(*stacks: Blocks) -> int:
    """Additions to the residual stream in these stacks together."""
    return sum(run.height for blocks in stacks for run in blocks)


def parse_layout(layout: str | list[Any], *, where: str = "model.hnet.layout") -> Layout:
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
    encoders: list[Blocks] = []
    decoders: list[Blocks] = []
    at = ""
    while True:
        if not isinstance(layout, list) or len(layout) not in (1, 3):
            what = f"a list of {len(layout)}" if isinstance(layout, list) else repr(layout)
            raise RecipeError(
                f"{where} at {at or 'the top'}: {what}; a stage is [encoder, inner, decoder], the innermost [blocks]"
            )
        if len(layout) == 1:
            main = () if layout[0] == HOUSE else _blocks(layout[0], f"{where} at {at}[0]")
            if not main and not encoders:
                raise RecipeError(f'{where} at [0]: a lone "{HOUSE}" chunks nothing; leave the layout empty')
            return Layout(tuple(encoders), main, tuple(decoders))
        encoders.append(_blocks(layout[0], f"{where} at {at}[0]"))
        decoders.append(_blocks(layout[2], f"{where} at {at}[2]"))
        layout, at = layout[1], f"{at}[1]"


def _blocks(text: Any, where: str) -> Blocks:
    if not isinstance(text, str):
        raise RecipeError(f"{where}: {json.dumps(text)} is no text of blocks, as in m4 or T1m4")
    runs, at = [], 0
    while at < len(text):
        found = re.compile(r"([A-Za-z])(\d+)").match(text, at)
        if found is None or found[1] not in LETTERS or int(found[2]) == 0:
            rest = text[at:]
            why = "a letter and a count of at least 1, as in m4" if found is None or found[1] in LETTERS else (
                f"{found[1]!r} is no block; there are m (Mamba-2), M (with feed-forward), t (attention), T (with it)"
            )  # fmt: skip
            raise RecipeError(f"{where}, character {at + 1} of {text!r}: cannot read {rest!r}: {why}")
        runs.append(Run(found[1], int(found[2])))
        at = found.end()
    if not runs:
        raise RecipeError(f"{where}: no blocks; write as in m4")
    return tuple(runs)
