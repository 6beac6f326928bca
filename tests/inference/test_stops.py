"""Where texts end: every way of cutting a text into parts shows the same."""

import itertools

import numpy as np
import pytest

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.marks import Writer
from adaptive.inference.stops import Part, Stops
from adaptive.printable import printable


def shown(stops: Stops, texts: list[str]) -> tuple[str, bool]:
    parts = [part for text in texts for part in stops.push(Part("", text))]
    return "".join(text for _, text in [*parts, *stops.finish()]), stops.reached


@pytest.mark.parametrize(
    ("stops", "text", "whole", "reached"),
    [
        ((), "abcab", "abcab", False),
        (("x",), "abcab", "abcab", False),
        (("ca",), "abcab", "ab", True),
        (("cab", "b"), "abcab", "a", True),
        (("aab",), "aaab", "a", True),
        (("abd",), "abcab", "abcab", False),
        (("bcx", "c"), "abcab", "ab", True),
    ],
)
def test_a_text_ends_before_the_first_stop_text(stops, text, whole, reached):
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        texts = [text[a:b] for a, b in itertools.pairwise(bounds)]
        assert shown(Stops(stops), texts) == (whole, reached)


def test_only_what_may_become_a_stop_text_waits():
    stops = Stops(["\nUser:"])
    assert [stops.push(Part("", char)) for char in "a\nU"] == [[Part("", "a")], [], []]
    assert "".join(text for _, text in stops.push(Part("", "n"))) == "\nUn"


def test_a_prompt_may_hold_a_stop_text_and_marks_keep_their_places():
    writer = Writer(load_tokenizer("bytes"), marks=True, stops=["END"])

    def push(text: str, begins: int, prompt: bool) -> str:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return writer.push(tokens, (np.arange(len(tokens)) == begins)[None], prompt=prompt)

    assert push("the END", 4, True) == "the |END" and not writer.stopped
    assert push(" of EN", 4, False) == " of "
    assert push("E", 0, False) == "|EN" and not writer.stopped
    assert push("ND", 9, False) == "" and writer.stopped
    assert push("more", 0, False) == "" and writer.finish() == ""


def test_marks_stay_colours_where_text_is_shown_safely():
    writer = Writer(load_tokenizer("bytes"), marks=True, colour=True, safe=True)
    text = writer.push(np.array([27, 99], np.int32), np.array([[True, False]]))
    assert text == "\x1b[36m|\x1b[0m␛c"


def test_what_would_steer_a_terminal_is_shown():
    assert printable("a\tb\n\x1b[31mred\r\x07\x7f\x9b2J€") == "a\tb\n␛[31mred␍␇␡\ufffd2J€"
