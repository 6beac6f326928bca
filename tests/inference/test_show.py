"""What is kept of a continuation as its pieces come."""

import numpy as np

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.marks import Writer
from adaptive.inference.sampling import Piece
from adaptive.inference.show import Continuation


def piece(text: str, valid: int | None = None, *, prompt: bool = False) -> Piece:
    """A row's tokens, of which the first `valid` belong to it."""
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]
    there = np.arange(tokens.shape[1])[None] < (tokens.shape[1] if valid is None else valid)
    logprobs = None if prompt else -np.arange(1.0, tokens.shape[1] + 1)[None]
    return Piece(tokens, there, np.zeros((0, *tokens.shape), bool), prompt, logprobs)


def continued(*pieces: Piece, stops: tuple[str, ...] = ()) -> tuple[Continuation, str]:
    row = Continuation(Writer(load_tokenizer("bytes"), stops=stops))
    text = "".join(row.add(each, 0) for each in pieces)
    return row, text + row.writer.finish()


def test_tokens_and_probabilities_are_those_of_the_continuation():
    row, text = continued(piece("ab", prompt=True), piece("cd"), piece("e"))
    assert (text, row.tokens, row.logprobs) == ("abcde", [99, 100, 101], [-1.0, -2.0, -1.0])
    assert row.ended == "length" and not row.done


def test_a_row_that_the_model_ends_is_done():
    row, text = continued(piece("a", prompt=True), piece("bcd", 2), piece("ef", 0))
    assert (text, row.tokens, row.ended, row.done) == ("abc", [98, 99], "end", True)


def test_what_follows_a_stop_text_is_not_read():
    row, text = continued(piece("x.", prompt=True), piece("a."), piece("b."), stops=(".",))
    assert (text, row.tokens, row.ended, row.done) == ("x.a", [97, 46], "stop", True)


def test_another_expert_is_marked_where_it_begins():
    tokens = np.frombuffer(b"abcd", np.uint8).astype(np.int32)
    experts, none = np.array([0, 0, 12, -1]), np.zeros((0, 4), bool)
    plain = Writer(load_tokenizer("bytes"), experts=True)
    assert plain.push(tokens, none, None, experts) + plain.finish() == "₀ab₁₂c₋d"
    coloured = Writer(load_tokenizer("bytes"), experts=True, depths=3, colour=True)
    shown = coloured.push(tokens, none, np.array([1, 1, 1, 3]), experts) + coloured.finish()
    ground, depth = "\x1b[48;5;17m", "\x1b[38;5;250m"  # experts 0 and 12 share a colour
    assert shown == f"{depth}{ground}ab{ground}c\x1b[38;5;196m\x1b[49md\x1b[0m"


def test_the_last_layer_with_an_expert_for_it_is_a_tokens_own():
    one = piece("ab")._replace(experts=np.array([[[1, 2]], [[3, -1]], [[-1, -1]]]))
    row, _ = continued(one)
    assert row.experts == [[1, 3, None], [2, None, None]]
    row = Continuation(Writer(load_tokenizer("bytes"), experts=True))
    assert row.add(one, 0) + row.writer.finish() == "₃a₂b"
