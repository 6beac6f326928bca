"""The grammar of layouts, the stacks that it spells, and how stacks are spelled."""

import json

import pytest

from adaptive.errors import RecipeError
from adaptive.interop.official_hnet_layout import Parts, Run, block_of, parse_layout, parts_in, stack_of, text_of
from adaptive.layers.block import Settings as Block
from adaptive.layers.feed_forwards.dense import Settings as Dense
from adaptive.layers.mixers.attention import Settings as Attention
from adaptive.layers.mixers.mamba2 import Settings as Mamba2

TWO = ["m4", ["T1m4", ["T26"], "m4T1"], "m4"]
PARTS = Parts(Attention(heads=2), Mamba2(d_state=8), Dense(64))


def test_a_layout_is_read_from_outside_in():
    layout = parse_layout(json.dumps(TWO))
    assert layout.encoders == ((Run("m", 4),), (Run("T", 1), Run("m", 4)))
    assert layout.decoders == ((Run("m", 4),), (Run("m", 4), Run("T", 1)))
    assert layout.main == (Run("T", 26),)
    assert layout.stages == 2
    assert [layout.letters(stage) for stage in range(3)] == ["mm", "TmmT", "T"]
    assert parse_layout(TWO) == layout
    assert parse_layout(["m2M1t3"]).main == (Run("m", 2), Run("M", 1), Run("t", 3))


def test_letters_are_blocks():
    assert block_of("m", PARTS) == Block(PARTS.mamba, None)
    assert block_of("M", PARTS) == Block(PARTS.mamba, PARTS.feed_forward)
    assert block_of("t", PARTS) == Block(PARTS.attention, None)
    assert block_of("T", PARTS) == Block(PARTS.attention, PARTS.feed_forward)


def test_additions_to_the_stream_are_those_that_the_release_counts():
    layout = parse_layout(TWO)
    stacks = [*layout.encoders, layout.main, *layout.decoders]
    assert [stack_of(runs, PARTS).additions for runs in stacks] == [4, 6, 52, 4, 6]


@pytest.mark.parametrize("text", ["m1", "T26", "T1m4", "m2M1t3", "t1T1t1"])
def test_a_stack_is_spelled_as_it_was_written(text):
    runs = parse_layout([text]).main
    settings = stack_of(runs, PARTS)
    assert settings.layers == sum(run.count for run in runs)
    assert (settings.stream, settings.scale_residual) == ("float32", True)
    assert text_of(settings) == text
    found = parts_in([settings])
    assert all(part is None or part == whole for part, whole in zip(found, PARTS, strict=True))


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (["m4", "m4"], ["at the top", "a list of 2"]),
        ([], ["at the top", "a list of 0"]),
        (["m4", ["T1", "m4"], "m4"], ["at [1]", "a list of 2"]),
        (["m4", ["m1", ["m1", ["T1"], "m1", "m1"], "m1"], "m4"], ["at [1][1]", "a list of 4"]),
        (["m4", "T22", "m4"], ["at [1]", "'T22'"]),
        (["m4", [["T22"]], "m4"], ["at [1][0]", "is no text of blocks"]),
        ([4], ["at [0]", "4 is no text"]),
        (["x4"], ["at [0]", "character 1 of 'x4'", "'x' is no block"]),
        (["m4", ["T22"], "m4q2"], ["at [2]", "character 3 of 'm4q2'", "'q2'", "'q' is no block"]),
        (["m4", ["T1m4", ["T3 T4"], "m4"], "m4"], ["at [1][1][0]", "character 3", "' T4'", "a letter and a count"]),
        (["m0"], ["at [0]", "'m0'", "a count from 1 to 9999"]),
        (["m4", ["T2t0"], "m4"], ["at [1][0]", "character 3", "'t0'"]),
        (["m"], ["at [0]", "'m'", "a letter and a count"]),
        ([""], ["at [0]", "no blocks"]),
        (["m4", ["T2"], ""], ["at [2]", "no blocks"]),
        (["m1", ["model"], "m1"], ["at [1][0]", "cannot read 'model'"]),
        (["model", ["T1"], "m1"], ["at [0]", "cannot read 'model'"]),
        ('["m4", ["T22"], "m4"', ["not a list", "character 21"]),
        ("m4", ["not a list", "character 1"]),
        ('{"m4": 1}', ["at the top", "{'m4': 1}"]),
    ],
)  # fmt: skip
def test_a_bad_layout_names_its_position(layout, parts):
    with pytest.raises(RecipeError) as error:
        parse_layout(layout)
    message = str(error.value)
    assert message.startswith("arch_layout")
    for part in parts:
        assert part in message, message
