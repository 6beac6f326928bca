"""The grammar of layouts, and the shapes that an H-Net's configuration refuses."""

import dataclasses
import json

import pytest

from adaptive.errors import RecipeError
from adaptive.layers.layout import Run, height, parse_layout
from adaptive.models.hnet_config import HNetConfig

TWO = ["m4", ["T1m4", ["T26"], "m4T1"], "m4"]
GOOD = HNetConfig(
    layout=json.dumps(TWO), widths=(16, 24, 32), intermediates=(0, 32, 64), heads=(4,), rotary_dims=(2,),
    ssm_head_dim=(8,), ratio_targets=(3.0,),
)  # fmt: skip


def test_a_layout_is_read_from_outside_in():
    layout = parse_layout(json.dumps(TWO))
    assert layout.encoders == ((Run("m", 4),), (Run("T", 1), Run("m", 4)))
    assert layout.decoders == ((Run("m", 4),), (Run("m", 4), Run("T", 1)))
    assert layout.main == (Run("T", 26),)
    assert (layout.stages, layout.house) == (2, False)
    assert layout.at(1) == (layout.encoders[1], layout.decoders[1]) and layout.at(2) == (layout.main,)
    assert [height(*layout.at(s)) for s in range(3)] == [8, 12, 52]  # additions to the stream, as the release counts
    assert parse_layout(TWO) == layout
    assert parse_layout(["m2M1t3"]).main == (Run("m", 2), Run("M", 1), Run("t", 3))


def test_the_innermost_network_may_be_the_rest_of_the_recipe():
    layout = parse_layout(["m4", ["model"], "m4"])
    assert layout.house and layout.main == () and layout.stages == 1


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
        (["m0"], ["at [0]", "'m0'", "a count of at least 1"]),
        (["m4", ["T2t0"], "m4"], ["at [1][0]", "character 3", "'t0'"]),
        (["m"], ["at [0]", "'m'", "a letter and a count"]),
        ([""], ["at [0]", "no blocks"]),
        (["m4", ["T2"], ""], ["at [2]", "no blocks"]),
        (["model"], ["at [0]", "a lone", "leave the layout empty"]),
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
    assert message.startswith("model.hnet.layout")
    for part in parts:
        assert part in message, message


def test_the_configuration_is_good_as_it_stands():
    GOOD.validate(inner_width=0)
    shape = GOOD.shape(1)
    assert (shape.width, shape.feed_forward, shape.heads, shape.head_dim) == (24, 128, 4, 6)
    assert GOOD.shape(2).feed_forward == 128 and GOOD.shape(0).feed_forward == 0
    HNetConfig().validate(inner_width=7)  # no H-Net, no demands


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"widths": (16, 24)}, ["model.hnet.widths has 2 numbers for 3 stages"]),
        ({"widths": ()}, ["model.hnet.widths has 0 numbers"]),
        ({"heads": (4, 4)}, ["model.hnet.heads has 2 numbers"]),
        ({"ssm_head_dim": (8, 8, 8, 8)}, ["model.hnet.ssm_head_dim has 4 numbers"]),
        ({"widths": (16, 32, 24)}, ["widths=16,32,24", "stage 2 is narrower"]),
        ({"widths": (32, 24, 24)}, ["widths=32,24,24", "stage 1 is narrower"]),
        ({"widths": (16, 26, 32)}, ["stage 1, letter T", "width 26 is not a multiple of the 4 attention heads"]),
        ({"rotary_dims": (2, 3, 2)}, ["stage 1, letter T", "rotary_dims=3 must be even"]),
        ({"rotary_dims": (2, 8, 2)}, ["stage 1, letter T", "at most the head's 6"]),
        ({"windows": (-1, -1, -2)}, ["stage 2, letter T", "windows=-2"]),
        ({"widths": (18, 24, 32)}, ["stage 0, letter m", "expand * width = 36", "ssm_head_dim=8", "nearest width: 16"]),
        ({"intermediates": (0, 32, 0)}, ["stage 2, letter T", "intermediates must be above 0"]),
        ({"intermediates": ()}, ["stage 1, letter T", "intermediates must be above 0"]),
        ({"layout": '["M4", ["T1m4", ["T26"], "m4T1"], "m4"]'}, ["stage 0, letter M", "intermediates"]),
        ({"chunkers": ("dynamic", "bytes")}, ["'bytes' at stage 1", "stride"]),
        ({"chunkers": ("dynamic", "space")}, ["space reads bytes", "not 1"]),
        ({"chunkers": ("words",)}, ["words reads bytes", "not 1"]),
        ({"ratio_targets": (3.0, 1.0)}, ["ratio_targets=1 at stage 1", "above 1"]),
        ({"chunkers": ("stride",), "ratio_targets": (2.5,)}, ["ratio_targets=2.5 at stage 0", "whole number"]),
        ({"capacities": (0.5,)}, ["capacities has 1 numbers", "need 2"]),
        ({"capacities": (0.5, 0.0)}, ["capacities=0 at stage 1", "above 0 and at most 1"]),
        ({"capacities": (1.2, 0.5)}, ["capacities=1.2 at stage 0"]),
        ({"capacities": (0.6, 0.8), "capacity_steps": (10,)}, ["2 chunking stages in 2 phases", "need 4"]),
        ({"capacities": (0.6,) * 6, "capacity_steps": (10, 10)}, ["capacity_steps=10,10", "must rise"]),
        ({"ratio_coefficient": -0.1}, ["must be at least 0"]),
        ({"flip_temperature": -1.0}, ["must be at least 0"]),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_work_says_where(change, parts):
    with pytest.raises(RecipeError) as error:
        dataclasses.replace(GOOD, **change).validate(inner_width=0)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_the_model_inside_has_the_width_of_the_last_stage():
    house = dataclasses.replace(GOOD, layout='["m4", ["T1", ["model"], "T1"], "m4"]')
    house.validate(inner_width=32)
    with pytest.raises(RecipeError, match=r"widths ends in 32, but .* model.hidden_size=48"):
        house.validate(inner_width=48)


def test_capacities_are_shares_in_multiples():
    def capacity(fraction, positions):
        return dataclasses.replace(GOOD, capacities=(fraction, 1.0)).capacity(0, positions)

    assert [capacity(c, 32) for c in (0.01, 0.25, 0.26, 0.5, 1.0)] == [8, 8, 8, 16, 32]
    assert [capacity(c, 2048) for c in (0.05, 0.25, 0.26, 1.0)] == [104, 512, 640, 2048]
    assert capacity(0.9, 5) == 5 and capacity(0.9, 140) == 128
    assert GOOD.capacity(1, 100) == 100
    phases = dataclasses.replace(GOOD, capacities=(0.6, 0.8, 0.3, 0.5), capacity_steps=(100,))
    assert [phases.at_phase(p).capacities for p in (0, 1)] == [(0.6, 0.8), (0.3, 0.5)]
