"""Text of tokens as they come: no half character is shown, none is lost, and stop texts take back what was held."""

import random

import pytest

from adaptive.data.tokenizers import load_tokenizer
from adaptive.inference.requests import Made
from adaptive.serving.texts import Piece, Texts

BYTES = load_tokenizer("bytes")


def pieces(content: bytes, stops=(), prompt=b"") -> list[Piece]:
    texts, given = Texts(BYTES, list(prompt), stops), []
    for byte in content:
        given.append(texts.push(Made(byte, -1.0)))
        if texts.stopped:
            break
    return [*given, texts.finish()]


def joined(content: bytes, stops=(), prompt=b"") -> str:
    return "".join(piece.text for piece in pieces(content, stops, prompt))


def test_bytes_of_a_character_wait_for_it():
    shown = pieces("a€b".encode())
    assert [piece.text for piece in shown] == ["a", "", "", "€", "b", ""]
    assert [len(piece.tokens) for piece in shown] == [1, 0, 0, 3, 1, 0]
    assert [(token.made.token, token.text, token.offset) for token in shown[3].tokens] == [
        (0xE2, "", 1), (0x82, "", 1), (0xAC, "€", 1),
    ]  # fmt: skip


def test_what_is_no_text_is_replaced_and_its_tokens_are_told():
    assert joined(b"a\xffb\xe2\x82") == "a�b�"
    last = pieces(b"a\xe2\x82")[-1]
    assert last.text == "�" and [token.made.token for token in last.tokens] == [0xE2, 0x82]
    assert joined("\xe9".encode()[1:], prompt=b"caf\xc3") == "é"  # a prompt of ids may end within a character


def test_a_stop_text_is_no_part_of_it_wherever_its_tokens_lie():
    assert [piece.text for piece in pieces(b"one two", stops=("two",))] == ["o", "n", "e", " ", "", "", "", ""]
    assert joined(b"one two. three", stops=("two",)) == "one "
    assert joined(b"one tw", stops=("two",)) == "one tw"  # held until nothing follows
    assert joined("a€€b".encode(), stops=("€b",)) == "a€"
    cut = pieces(b"one two", stops=("two",))
    assert [token.made.token for piece in cut for token in piece.tokens] == list(b"one ")


@pytest.mark.parametrize("seed", range(30))
def test_pieces_are_their_tokens(seed):
    draw = random.Random(seed)
    content = "".join(draw.choice("ab€é ") for _ in range(12)).encode()
    content = bytes(byte for byte in content if draw.random() > 0.1)
    stops = tuple("".join(draw.choice("ab€é ") for _ in range(draw.randint(2, 3))) for _ in range(draw.randint(0, 2)))
    whole = content.decode(errors="replace")
    expected = whole[: min([at for stop in stops if (at := whole.find(stop)) >= 0], default=len(whole))]
    shown = pieces(content, stops)
    assert "".join(piece.text for piece in shown) == expected
    tokens = [token for piece in shown for token in piece.tokens]
    for piece in shown:
        assert not piece.tokens or piece.text == "".join(token.text for token in piece.tokens)
    assert bytes(token.made.token for token in tokens) == content[: len(tokens)]
    if expected == whole:
        assert len(tokens) == len(content)
    offset = 0
    for token in tokens:
        assert token.offset == offset
        offset += len(token.text)
