"""A passage of text with each token shaded by the depth it was given: for the page, and for a terminal."""

import html
import sys
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from adaptive.inference.marks import legend, mark
from adaptive.printable import printable
from adaptive.training.report.schema import TokenRecord
from adaptive.training.report.svg import element

_NEWLINE = "↵"
# Of a sequential blue scale, shallow to deep, with the text colour that reads best on each.
_SHADES = (("#deebf7", "#10243d"), ("#9ecae1", "#10243d"), ("#4292c6", "#ffffff"), ("#08519c", "#ffffff"))


def passage_html(passage: Sequence[TokenRecord], deepest: int, deepest_loss: float) -> str:
    """Spans of the page. Each carries its depth and loss, and `--d` and `--l`, both in 0..1, by which the style sheet
    shades it.

    deepest       passes that shade a token fully
    deepest_loss  nats that do
    """
    spans = []
    for token in passage:
        depth = level(token.depth, deepest)
        loss = _share(token.loss, deepest_loss)
        text = _text(token)
        kind = " ".join(("t", *("deep",) * (depth > 0.6), *("high",) * (loss > 0.6), *("part",) * (not token.text)))
        told = {"data_d": token.depth} | ({} if token.loss is None else {"data_l": f"{token.loss:.2f}"})
        spans.append(element("span", text, kind=kind, style=f"--d:{depth:.2f};--l:{loss:.2f}", **told))
    return "".join(spans)


def chunks_html(
    passage: Sequence[TokenRecord], sizes: Sequence[Sequence[int]], learned: Sequence[bool], deepest_loss: float
) -> str:
    """Spans of the page, one per token: a mark of class b1, b2, ... where so many stages begin a chunk, class `o` in
    every other innermost chunk, and what is told of the token when pointed at.

    sizes    per stage, the bytes of the chunk that each token is in (`chunk_sizes`)
    learned  per stage, whether a router decides, so that its probability tells something
    """
    spans, chunk = [], 0
    for i, token in enumerate(passage):
        chunk += token.begins >= len(sizes)
        loss = _share(token.loss, deepest_loss)
        marks = (f"b{token.begins}",) if token.begins else ()
        odd = ("o",) * (chunk % 2)
        kind = " ".join(("t", *marks, *odd, *("high",) * (loss > 0.6), *("part",) * (not token.text)))
        told = [_told(s, token, sizes[s][i], learned[s]) for s in range(len(sizes))]
        data = {"data_c": "\n".join(told)} | ({} if token.loss is None else {"data_l": f"{token.loss:.2f}"})
        spans.append(element("span", _text(token), kind=kind, style=f"--l:{loss:.2f}", **data))
    return "".join(spans)


def chunk_sizes(passage: Sequence[TokenRecord], stage: int) -> list[int]:
    """For every token, how many tokens the chunk of this stage has that it is in."""
    starts = [i for i, token in enumerate(passage) if token.begins > stage or i == 0]
    return [b - a for a, b in zip(starts, [*starts[1:], len(passage)], strict=True) for _ in range(a, b)]


def _told(stage: int, token: TokenRecord, size: int, learned: bool) -> str:
    here = "begins a chunk of" if token.begins > stage else "in a chunk of"
    known = learned and stage < len(token.probabilities)
    chance = f", p {token.probabilities[stage]:.2f}" if known else ""
    return f"stage {stage}: {here} {size} byte{'s' * (size != 1)}{chance}"


def _text(token: TokenRecord) -> str:
    return html.escape(token.text).replace("\n", f'<i class="nl">{_NEWLINE}</i>\n')


def _share(loss: float | None, deepest: float) -> float:
    return 0.0 if loss is None else min(1.0, max(0.0, loss / deepest))


def level(depth: int, deepest: int) -> float:
    """Where a depth lies between one pass (0) and the deepest (1)."""
    return min(1.0, max(0.0, (depth - 1) / max(1, deepest - 1)))


def print_passage(passage: Sequence[TokenRecord], deepest: int, stream: TextIO | None = None) -> None:
    """Prints the passage with a legend: shaded where the stream shows colour, else with each token's depth below it.

    deepest  passes through the shared block at most
    """
    console = Console(file=stream or sys.stdout, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
        console.print(passage_shaded(passage, deepest))
        return
    console.print("Below each token, its passes through the shared block:\n")
    for line in passage_digits(passage, min(console.width, 100)):
        console.print(Text(line), soft_wrap=True)


def passage_shaded(passage: Sequence[TokenRecord], deepest: int) -> Text:
    """The passage on backgrounds that darken with depth, below a legend."""
    out = Text("passes through the shared block: ")
    for depth in range(1, deepest + 1):
        out.append(f" {depth} ", _style(depth, deepest)).append(" ")
    out.append("\n\n")
    for token in passage:
        out.append(_safe(token), _style(token.depth, deepest))
    return out


def print_chunks(passage: Sequence[TokenRecord], stages: int, stream: TextIO | None = None) -> None:
    """Prints the passage with marks where chunks begin, in colours where the stream shows them."""
    console = Console(file=stream or sys.stdout, highlight=False)
    colour = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    console.print(Text.from_ansi(legend(stages, colour)), soft_wrap=True)
    console.print()
    out, begins = Text(), 0
    for token in passage:
        begins = max(begins, token.begins)  # of a character, wherever within it
        if token.text:
            if begins:
                out.append_text(Text.from_ansi(mark(begins - 1, colour)))
            out.append(_safe(token))
            begins = 0
    console.print(out, soft_wrap=True)


def _safe(token: TokenRecord) -> str:
    """Its text for a terminal, which does nothing of what it may say, with line ends made visible."""
    return printable(token.text).replace("\n", f"{_NEWLINE}\n")


def passage_digits(passage: Sequence[TokenRecord], width: int) -> list[str]:
    """The passage in lines of at most `width` cells, each followed by a line with the depth under every token's first
    cell; a token of several cells continues with dots."""
    lines, text, digits = [], "", ""
    for token in passage:
        for i, piece in enumerate(_pieces(token.text)):
            mark = str(min(token.depth, 9)) if i == 0 else "·"
            cells = cell_len(piece)
            if cell_len(text) + cells > width:
                lines += [text, digits]
                text = digits = ""
            text, digits = text + piece, digits + mark.ljust(cells)
            if piece == _NEWLINE:
                lines += [text, digits]
                text = digits = ""
    return [*lines, text, digits] if text else lines


def _pieces(text: str) -> list[str]:
    """Characters that take room, line ends made visible, control characters left out."""
    shown = (_NEWLINE if char == "\n" else " " if char == "\t" else char for char in text)
    return [char for char in shown if cell_len(char) > 0]


def _style(depth: int, deepest: int) -> Style:
    back, front = _SHADES[round(level(depth, deepest) * (len(_SHADES) - 1))]
    return Style(color=front, bgcolor=back)
